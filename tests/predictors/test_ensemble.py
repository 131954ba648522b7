from collections.abc import Sequence

import pytest
import torch

from nernlit.errors import UsageError
from nernlit.predictors import MLP, Predictor, PredictorEnsemble, Quantized

EXTENT = (4, 6, 5)
LAYERS = [(6, 5)] * 4


def _trials(count: int = 3) -> PredictorEnsemble:
    predictor = MLP(8, num_frequencies=4, activation="gelu")
    predictor.bind(LAYERS)
    trials = PredictorEnsemble(predictor, count)
    trials.reset(*range(10, 10 + count))
    return trials


def _addresses(count: int = 20) -> torch.Tensor:
    return torch.stack([torch.randint(0, extent, (count,)) for extent in EXTENT], 1).int()


def test_both_ways_give_what_every_trial_gives_alone() -> None:
    trials, addresses = _trials(), _addresses()
    alone = torch.stack([predictor(addresses) for predictor in trials.each])
    assert torch.equal(trials(addresses), alone)
    assert torch.allclose(trials.batched(addresses), alone, atol=1e-6)


def test_both_ways_have_the_same_gradients() -> None:
    trials, addresses = _trials(), _addresses()
    gradients = []
    for run in (trials.forward, trials.batched):
        trials.zero_grad()
        run(addresses).square().sum().backward()
        gradients.append([p.grad.clone() for p in trials.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(list(trials.parameters()))
    for one, two in zip(*gradients, strict=True):
        assert torch.allclose(one, two, rtol=1e-4, atol=1e-5)


class _Free(Predictor):
    def bind(self, layers: Sequence[tuple[int, int]]) -> None:
        self.entries = torch.nn.Parameter(torch.zeros(len(layers), *layers[0], 3, 3))

    def forward(self, addresses_N3: torch.Tensor) -> torch.Tensor:
        return self.entries[tuple(addresses_N3.long().T)]


def test_what_cannot_restart_is_refused() -> None:
    predictor = _Free()
    predictor.bind(LAYERS)
    with pytest.raises(
        UsageError, match=r"_Free cannot be initialized again; add a method reset_parameters\(\) to _Free"
    ):
        PredictorEnsemble(predictor, 2).reset(0, 1)


def test_a_trial_starts_as_a_new_predictor_of_its_seed() -> None:
    trials = _trials()
    for seed, predictor in zip((10, 11, 12), trials.each, strict=True):
        torch.manual_seed(seed)
        fresh = MLP(8, num_frequencies=4, activation="gelu")
        for one, two in zip(predictor.parameters(), fresh.parameters(), strict=True):
            assert torch.equal(one, two)


def test_starting_anew_leaves_the_global_randomness_alone() -> None:
    trials = _trials()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    trials.reset(1, 2, 3)
    assert torch.equal(torch.rand(3), expected)


def test_quantized_trials_have_step_sizes_of_their_own_numbers() -> None:
    predictor = Quantized(MLP(8, num_frequencies=4), 4.0)
    predictor.bind(LAYERS)
    trials = PredictorEnsemble(predictor, 2)
    for seeds in ((1, 2), (3, 4)):
        trials.reset(*seeds)
        for each in trials.each:
            again = {name: value.clone() for name, value in each.named_parameters()}
            each.reset_parameters()
            for name, value in each.named_parameters():
                assert torch.equal(again[name], value), name


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator")
def test_quantized_trials_are_trained_on_an_accelerator() -> None:
    predictor = Quantized(MLP(8, num_frequencies=4), 4.0)
    predictor.bind(LAYERS)
    device = torch.accelerator.current_accelerator()
    trials = PredictorEnsemble(predictor, 2).to(device)
    trials(_addresses().to(device)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in trials.parameters())
