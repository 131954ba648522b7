from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.cli import ReduceLROnPlateau
from torch import nn

from nernlit.cli.main import main
from nernlit.data import DigitsDataModule
from nernlit.errors import UsageError
from nernlit.kernels import Uniform
from nernlit.optimizers import WarmupCosine
from nernlit.originals import Original
from nernlit.training import (
    BaselineJoint,
    DecoupledDistill,
    OriginalModule,
    Progressive,
    ReconOnly,
    ReconstructionPhase,
)
from nernlit.training.optimization import build_optimizer, relative_rate
from nernlit.training.recovery import Recovery
from tests.fakes import QUICK, digits_representation, quiet_trainer

Make = Callable[[Iterator[nn.Parameter]], torch.optim.Optimizer]


def _adam(params: Iterator[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, lr=1e-3)


def _fit(make: Make, **options: Any) -> ReconOnly:
    module = ReconOnly(digits_representation(), make, sampling=Uniform(64), **options)
    data = DigitsDataModule(train_on="none", steps_per_epoch=2)
    quiet_trainer(max_epochs=2, num_sanity_val_steps=0).fit(module, datamodule=data)
    return module


DENSE = [
    name
    for name in sorted(torch.optim.__all__)
    if name not in ("Optimizer", "Muon", "SparseAdam") and isinstance(getattr(torch.optim, name), type)
]


@pytest.mark.parametrize("name", DENSE)
def test_any_optimizer_of_torch_for_dense_gradients_trains(name: str) -> None:
    torch.manual_seed(0)
    module = _fit(lambda params: getattr(torch.optim, name)(params, lr=1e-3))
    fresh = digits_representation().predictor
    for one, two in zip(module.representation.predictor.parameters(), fresh.parameters(), strict=True):
        assert torch.isfinite(one).all()
        assert not torch.equal(one, two)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        pytest.param(
            lambda p: torch.optim.Muon(p),
            r"Muon only supports 2D parameters .* timm\.optim\.Muon takes all of them",
            marks=pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="older torch has no Muon"),
        ),
        (lambda p: torch.optim.SparseAdam(p), "SparseAdam needs sparse gradients, and these are dense; pass Adam"),
        (lambda p: torch.optim.SGD(p, lr=-1), r"--model\.optimizer cannot be built: Invalid learning rate: -1"),
        (lambda p: torch.optim.Adam(p, lr=0.0), r"lr=0; expected a finite learning rate above 0"),
        (lambda p: torch.optim.Adam(p, lr=float("inf")), r"lr=inf; expected a finite learning rate above 0"),
        (lambda p: torch.optim.Adam(p, betas=(2, 0)), r"--model\.optimizer cannot be built: Invalid beta"),
    ],
)
def test_an_optimizer_that_cannot_train_is_one_clear_error(make: Make, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        _fit(make)


def test_a_negative_learning_rate_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["fit", *QUICK, "--model.optimizer=torch.optim.Adam", "--model.optimizer.lr=-1"])
    assert ended.value.code == 2
    assert "--model.optimizer cannot be built: Invalid learning rate: -1.0." in capsys.readouterr().err


def test_reduce_on_plateau_follows_its_metric_at_every_validation() -> None:
    rates: list[float] = []
    note = LambdaCallback(
        on_train_batch_start=lambda trainer, *_: rates.append(trainer.optimizers[0].param_groups[0]["lr"])
    )
    module = ReconOnly(
        digits_representation(),
        lambda params: torch.optim.SGD(params, lr=1.0e-3),
        lambda optimizer: ReduceLROnPlateau(optimizer, "val/acc_original", factor=0.5, patience=0),
    )
    data = DigitsDataModule(train_on="none", steps_per_epoch=2)
    options = {"callbacks": [note], "num_sanity_val_steps": 0}
    quiet_trainer(max_epochs=6, check_val_every_n_epoch=2, **options).fit(module, datamodule=data)
    # The original's accuracy never changes: the first of three validations sets the mark, the others find a plateau.
    assert rates == [1e-3] * 8 + [5e-4] * 4
    with pytest.raises(UsageError, match="ReduceLROnPlateau is stepped at the end of epochs"):
        quiet_trainer(max_epochs=6, check_val_every_n_epoch=None, val_check_interval=3).fit(module, datamodule=data)


def test_reduce_on_plateau_works_from_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    cls = "lightning.pytorch.cli.ReduceLROnPlateau"
    main(["fit", *QUICK, f"--model.scheduler={cls}", "--model.scheduler.monitor=val/acc", "--model.scheduler.mode=max"])
    with pytest.raises(SystemExit):
        main(["fit", *QUICK, "--model.scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau"])
    assert "does not say which metric it follows" in capsys.readouterr().err
    assert len(list(Path("runs").rglob("best.ckpt"))) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"warmup_steps": -1}, "warmup_steps=-1; expected at least 0"),
        ({"min_lr": -0.1}, r"min_lr=-0\.1; expected at least 0"),
        ({"min_lr": float("nan")}, "min_lr=nan; expected at least 0"),
        ({"min_lr": 2.0}, r"min_lr=2\.0 is above the learning rate \(1\)"),
        ({"total_steps": 0}, "total_steps=0; expected at least 1"),
    ],
)
def test_a_schedule_that_makes_no_sense_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        WarmupCosine(torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0), **options)


def test_a_schedule_that_torch_refuses_is_one_clear_error() -> None:
    with pytest.raises(UsageError, match=r"--model\.scheduler cannot be built: .*step_size"):
        _fit(_adam, scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer))  # type: ignore[call-arg]


JOINT = ["warmup_steps", "recon_weight", "feature_weight", "kd_weight", "kd_inside_log"]
DECOUPLED = ["recon_weight", "feature_weight", "kd_weight", "kd_inside_log", "cross_entropy_weight"]


@pytest.mark.parametrize("value", [-1, float("nan"), float("inf")])
def test_weights_and_temperatures_are_finite_and_not_negative(value: float) -> None:
    for name in JOINT:
        with pytest.raises(UsageError, match=f"{name}={value}; expected at least 0"):
            BaselineJoint(digits_representation(), _adam, **{name: value})  # type: ignore[arg-type]
    for name in DECOUPLED:
        with pytest.raises(UsageError, match=f"{name}={value}; expected at least 0"):
            DecoupledDistill(digits_representation(), optimizer=_adam, **{name: value})  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=f"reconstruction.steps={value}; expected at least 0"):
        DecoupledDistill(
            digits_representation(),
            optimizer=_adam,
            reconstruction=ReconstructionPhase(value),  # type: ignore[arg-type]
        )
    for temperature in (value, 0.0):
        with pytest.raises(UsageError, match=f"temperature={temperature}; expected a finite number above 0"):
            BaselineJoint(digits_representation(), _adam, temperature=temperature)
        with pytest.raises(UsageError, match=f"temperature={temperature}; expected a finite number above 0"):
            DecoupledDistill(digits_representation(), optimizer=_adam, temperature=temperature)
    with pytest.raises(UsageError, match=r"label_smoothing=.*; expected a share"):
        OriginalModule(Original("digits_resnet8"), _adam, label_smoothing=value)
    if value != -1:
        with pytest.raises(UsageError, match=f"min_delta={value}; expected a finite number"):
            Progressive(digits_representation(), optimizer=_adam, min_delta=value)


def test_an_original_trains_in_mixed_precision() -> None:
    module = OriginalModule(Original("digits_resnet8"), _adam)
    trainer = quiet_trainer(max_steps=3, precision="bf16-mixed")
    trainer.fit(module, datamodule=DigitsDataModule(batch_size=32))
    assert torch.isfinite(trainer.callback_metrics["train/loss"])
    with pytest.raises(UsageError, match=r"precision 64-true: OriginalModule works in 32-true, bf16-mixed, 16-mixed\."):
        quiet_trainer(max_steps=3, precision="64-true").fit(module, datamodule=DigitsDataModule())


def test_an_optimizer_that_plans_one_rate_is_refused_where_several_are_needed() -> None:
    class Planned(torch.optim.Adam):
        schedules_itself = True

    first, second = (torch.nn.Parameter(torch.zeros(2)) for _ in range(2))
    build_optimizer(lambda parameters: Planned(parameters, lr=1.0), {first: 1.0, second: 1.0}, "--model")
    with pytest.raises(UsageError, match=r"--model\.optimizer Planned has one learning rate for all parameters"):
        build_optimizer(lambda parameters: Planned(parameters, lr=1.0), {first: 1.0, second: 0.1}, "--model")


def test_ratios_of_learning_rates_hold_under_every_schedule() -> None:
    first, second = (torch.nn.Parameter(torch.zeros(2)) for _ in range(2))
    optimizer = build_optimizer(lambda groups: torch.optim.SGD(groups, lr=1.0), {first: 1.0, second: 0.1}, "--model")
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2.0, total_steps=8)
    for _ in range(7):
        with Recovery("stop").lowered(optimizer):
            one, other = (group["lr"] for group in optimizer.param_groups)
            assert other == pytest.approx(0.1 * one)
            assert 0 < relative_rate(optimizer) <= 1
            optimizer.step()
        schedule.step()
    assert len({group["lr"] for group in optimizer.param_groups}) == 1  # outside of steps those of the schedule
