import math

import pytest
import torch
from torch.nn import Parameter

from nernlit.errors import UsageError
from nernlit.optimizers import NeedsTotalSteps, Ranger, WarmupCosine
from nernlit.optimizers.ranger21 import Ranger21
from tests.fakes import tiny_representation


def test_warmup_cosine_is_linear_up_and_half_a_cosine_down() -> None:
    optimizer = torch.optim.SGD([Parameter(torch.ones(1))], lr=0.5)
    schedule = WarmupCosine(optimizer, warmup_steps=4, min_lr=0.1)
    schedule.set_total_steps(20)
    rates = []
    for _ in range(20):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[:4] == pytest.approx([0.125, 0.25, 0.375, 0.5])
    assert rates[4:] == pytest.approx([0.1 + 0.4 * (1 + math.cos(math.pi * i / 16)) / 2 for i in range(16)])
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1)


def test_warmup_cosine_goes_on_when_a_fit_is_made_longer() -> None:
    first, second = (WarmupCosine(torch.optim.SGD([Parameter(torch.ones(1))], lr=0.5)) for _ in range(2))
    first.set_total_steps(10)
    second.set_total_steps(20)
    for _ in range(10):
        first.optimizer.step()
        first.step()
    second.load_state_dict(first.state_dict())
    assert second.get_lr() == pytest.approx([0.25])


def test_warmup_cosine_without_a_length_says_so() -> None:
    optimizer = torch.optim.SGD([Parameter(torch.ones(1))], lr=0.5)
    schedule = WarmupCosine(optimizer)
    optimizer.step()
    with pytest.raises(UsageError, match="does not know the length of the run; pass total_steps"):
        schedule.step()


def test_ranger_2019_is_radam_in_lookahead_with_the_papers_settings() -> None:
    fast, parameter, unused = Parameter(torch.ones(2, 2)), Parameter(torch.ones(2, 2)), Parameter(torch.ones(1))
    optimizer = Ranger([parameter, unused])
    group = optimizer.param_groups[0]
    assert (group["lookahead_k"], group["lookahead_alpha"]) == (6, 0.5)
    assert (group["lr"], tuple(group["betas"]), group["weight_decay"]) == (5e-3, (0.5, 0.999), 1e-3)
    radam = torch.optim.RAdam([fast], lr=5e-3, weight_decay=1e-3, betas=(0.5, 0.999), decoupled_weight_decay=True)
    slow = (
        fast.detach().clone()
    )  # Lookahead (arXiv 1907.08610, algorithm 1), whose slow weights start with the fast ones
    for step in range(1, 21):
        for weights, stepper in ((parameter, optimizer), (fast, radam)):
            (weights**4).sum().backward()
            stepper.step()
            stepper.zero_grad()
        if step % 6 == 0:
            slow += 0.5 * (fast.detach() - slow)
            fast.data.copy_(slow)
        assert torch.allclose(parameter, fast), step
    unused.sum().backward()  # its first gradient
    optimizer.step()
    assert float(unused.detach()) < 1


def test_ranger21_is_silent_and_plans_for_the_runs_length(capsys: pytest.CaptureFixture[str]) -> None:
    representation = tiny_representation()
    optimizer = Ranger21(representation.predictor.parameters(), lr=1e-2)
    assert isinstance(optimizer, NeedsTotalSteps)
    optimizer.set_total_steps(100)
    assert (optimizer.total_iterations, optimizer.start_warm_down) == (100, 72)
    losses = []
    for _ in range(100):
        loss = (representation.kernels() - representation.target).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert capsys.readouterr().out == ""
    assert optimizer.current_lr < 1e-3  # it has warmed down
    assert losses[-1] < 0.8 * losses[0]


def test_least_rates_of_groups_have_the_ratios_of_their_rates() -> None:
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (1.0, 0.02, 0.0)]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    schedule = WarmupCosine(optimizer, warmup_steps=1, min_lr=0.1, total_steps=5)
    for _ in range(5):
        rates = schedule.get_last_lr()
        assert rates == pytest.approx([rates[0], 0.02 * rates[0], 0.0])
        optimizer.step()
        schedule.step()
    assert schedule.get_last_lr() == pytest.approx([0.1, 0.002, 0.0])
