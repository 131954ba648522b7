"""How long fits are: refused before data is read where it cannot be right, and ended by a validation."""

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback, Timer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from nernlit.cli.main import main, run
from nernlit.data import DigitsDataModule
from nernlit.errors import UsageError
from nernlit.optimizers import WarmupCosine
from nernlit.training import BaselineJoint, DecoupledDistill, Progressive, ReconOnly, ReconstructionPhase, Scheme
from tests.fakes import CONFIGS, QUICK, digits_representation, quiet_trainer


def _adam(params: Iterator[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, lr=1e-3)


def _sgd(params: Iterator[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=1.0)


class Unread(DigitsDataModule):
    """Images that nobody may read."""

    def setup(self, stage: str) -> None:
        raise AssertionError("images were read")


def _recon() -> Scheme:
    return ReconOnly(digits_representation(), _adam)


def _progressive() -> Scheme:
    return Progressive(digits_representation(), optimizer=_adam, rounds=3)


def _decoupled() -> Scheme:
    return DecoupledDistill(digits_representation(), optimizer=_adam, reconstruction=ReconstructionPhase(30))


def _joint() -> Scheme:
    return BaselineJoint(digits_representation(), _adam, warmup_steps=30)


@pytest.mark.parametrize(
    ("build", "options", "message"),
    [
        (_recon, {"max_epochs": 0}, "--trainer.max_epochs 0: the fit would make no step"),
        (_recon, {"max_steps": 0}, "--trainer.max_steps 0: the fit would make no step"),
        (_recon, {"limit_train_batches": 0}, "--trainer.limit_train_batches 0: the fit would make no step"),
        (_progressive, {"max_epochs": 4}, "max_epochs=4, rounds=3, check_val_every_n_epoch=1: a round must have"),
        (
            _progressive,
            {"max_epochs": 6, "check_val_every_n_epoch": 4},
            "max_epochs=6, rounds=3, check_val_every_n_epoch=4: a round must have",
        ),
        (
            _decoupled,
            {"max_epochs": 3},
            r"the run ends after 30 steps, within phase 1 \(reconstruction.steps=30\)",
        ),
        (
            _decoupled,
            {"max_steps": 20},
            r"the run ends after 20 steps, within phase 1 \(reconstruction.steps=30\)",
        ),
        (_progressive, {"fast_dev_run": True}, "--trainer.fast_dev_run has one epoch, and the 3 rounds have at least"),
        (_joint, {"max_epochs": 6, "limit_train_batches": 5}, r"ends after 30 steps, within the loss warm-up"),
        (_joint, {"max_epochs": 5, "accumulate_grad_batches": 2}, r"ends after 25 steps, within the loss warm-up"),
        (
            _recon,
            {"max_epochs": 1, "precision": "bf16-true"},
            "--trainer.precision bf16-true: ReconOnly works in 32-true",
        ),
        (_recon, {"max_epochs": 1, "precision": "bf16-mixed"}, "--model.precision bf16 runs training steps in it"),
        (_recon, {"max_epochs": 1, "precision": "64-true"}, "--trainer.precision 64-true: ReconOnly works in 32-true"),
        (_recon, {"max_epochs": 1, "precision": "16-true"}, "--trainer.precision 16-true: ReconOnly works in 32-true"),
    ],
)
def test_what_cannot_work_is_refused_before_images_are_read(
    build: Callable[[], Scheme], options: dict[str, object], message: str
) -> None:
    data = Unread(train_on="noise", steps_per_epoch=10)
    with pytest.raises(UsageError, match=message):
        quiet_trainer(**options).fit(build(), datamodule=data)


@pytest.mark.parametrize("build", [_recon, _decoupled, _joint])
def test_a_trial_of_a_few_batches_may_end_anywhere(build: Callable[[], Scheme]) -> None:
    trainer = L.Trainer(fast_dev_run=2, enable_progress_bar=False, enable_model_summary=False)
    trainer.fit(build(), datamodule=DigitsDataModule(batch_size=100))
    assert trainer.global_step == 2


def test_steps_per_epoch_are_refused_where_images_decide_them() -> None:
    message = "--data.steps_per_epoch 10 has no effect with --data.train_on images, where an epoch is a pass over the"
    with pytest.raises(UsageError, match=message):
        quiet_trainer(max_epochs=1).fit(_decoupled(), datamodule=Unread(train_on="images", steps_per_epoch=10))


def test_lengths_that_depend_on_the_images_are_checked_once_these_are_read() -> None:
    with pytest.raises(UsageError, match=r"the run ends after 12 steps, within phase 1 \(reconstruction.steps=30\)"):
        quiet_trainer(max_epochs=1).fit(_decoupled(), datamodule=DigitsDataModule(batch_size=100))


def test_the_command_line_refuses_rounds_before_it_orders_kernels(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def ordered(*_: object, **__: object) -> None:
        raise AssertionError("kernels were ordered")

    monkeypatch.setattr("nernlit.representation.representation.addresses", ordered)
    for options in (["--trainer.max_epochs=4"], ["--trainer.max_epochs=0"]):
        with pytest.raises(SystemExit) as ended:
            main(["fit", "-c", str(CONFIGS / "digits_h128.yaml"), *options])
        assert ended.value.code == 2
    said = capsys.readouterr().err
    assert "max_epochs=4, rounds=" in said
    assert "--trainer.max_epochs 0: the fit would make no step" in said


class Validations(L.Callback):
    """Keep the steps at which a fit validates, and pass time."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self.steps: list[int] = []

    def on_train_batch_end(self, *_: object) -> None:
        time.sleep(self.seconds)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self.steps.append(trainer.global_step)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"max_epochs": 5, "check_val_every_n_epoch": 2}, [8, 16, 20]),
        ({"max_epochs": 4, "check_val_every_n_epoch": 2}, [8, 16]),
        ({"max_epochs": 1, "check_val_every_n_epoch": 3}, [4]),
        ({"max_steps": 6}, [4, 6]),
        ({"max_steps": 8}, [4, 8]),
        ({"max_steps": 6, "check_val_every_n_epoch": 2}, [6]),
        ({"max_epochs": 2, "val_check_interval": 0.5}, [2, 4, 6, 8]),
        ({"max_epochs": 2, "val_check_interval": 3, "check_val_every_n_epoch": None}, [3, 6, 8]),
        ({"max_epochs": 3, "accumulate_grad_batches": 2, "check_val_every_n_epoch": 2}, [4, 6]),
        ({"max_steps": 6, "min_epochs": 3}, [4, 6]),
        ({"max_epochs": 3, "check_val_every_n_epoch": 2, "min_steps": 100}, [8, 12]),
    ],
)
def test_a_fit_ends_with_one_validation(options: dict[str, object], expected: list[int]) -> None:
    seen = Validations()
    trainer = quiet_trainer(callbacks=[seen], **options)
    trainer.fit(_recon(), datamodule=DigitsDataModule(train_on="none", steps_per_epoch=4))
    assert seen.steps == expected
    assert trainer.check_val_every_n_epoch == options.get("check_val_every_n_epoch", 1)


class Endless(IterableDataset[int]):
    """Three batches, which nobody can count before."""

    def __iter__(self) -> Iterator[int]:
        return iter(range(3))


def test_a_training_loader_without_a_length_needs_a_number_of_steps() -> None:
    loader = DataLoader(Endless(), batch_size=None)
    rates: list[float] = []
    seen = LambdaCallback(
        on_train_batch_start=lambda trainer, *_: rates.append(trainer.optimizers[0].param_groups[0]["lr"])
    )

    def recon() -> ReconOnly:
        return ReconOnly(digits_representation(), _sgd, scheduler=WarmupCosine)

    with pytest.raises(
        UsageError, match=r"is not known \(the training data loader has no length\), .* pass --trainer.max_steps"
    ):
        quiet_trainer(max_epochs=2).fit(recon(), loader)
    quiet_trainer(max_epochs=-1, max_steps=4, callbacks=[seen]).fit(recon(), loader)
    assert rates == pytest.approx([(1 + math.cos(math.pi * step / 4)) / 2 for step in range(4)])
    quiet_trainer(max_epochs=2).fit(_recon(), loader)  # needs no length
    with pytest.raises(UsageError, match=r"has no length, and Progressive's rounds .*limit_train_batches N"):
        quiet_trainer(max_epochs=2).fit(Progressive(digits_representation(), optimizer=_sgd, rounds=2), loader)


def test_a_training_loader_without_batches_is_refused() -> None:
    with pytest.raises(UsageError, match="the training data loader has no batches"):
        quiet_trainer(max_epochs=2).fit(_recon(), DataLoader([], batch_size=None))


def test_a_fit_that_runs_out_of_time_ends_with_a_validation() -> None:
    seen = Validations(0.05)
    trainer = quiet_trainer(callbacks=[seen], max_epochs=10_000, max_time="00:00:00:01", check_val_every_n_epoch=5_000)
    trainer.fit(_recon(), datamodule=DigitsDataModule(train_on="none", steps_per_epoch=4))
    assert seen.steps == [trainer.global_step]
    assert 0 < trainer.global_step <= 21


def test_max_time_ends_a_fit_of_the_command_line_with_its_summary(capsys: pytest.CaptureFixture[str]) -> None:
    line = ["fit", *QUICK, "--trainer.max_epochs=100000", "--trainer.check_val_every_n_epoch=100000"]
    cli = run([*line, "--trainer.max_time=00:00:00:01"])
    callbacks: list[L.Callback] = cli.trainer.callbacks  # type: ignore[attr-defined]
    (timer,) = [callback for callback in callbacks if isinstance(callback, Timer)]
    assert timer.time_elapsed("train") >= 1
    assert "reconstructed accuracy" in capsys.readouterr().out
    assert (Path(cli.trainer.log_dir) / "checkpoints" / "best.ckpt").is_file()
    tested = run(["test", *QUICK, "--ckpt_path=best"])
    assert "test/acc" in tested.trainer.callback_metrics


def _curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder)).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_evaluations_leave_the_curves_of_a_fit_as_they_are() -> None:
    line = [*QUICK, "--trainer.callbacks=nernlit.callbacks.LayerDifference"]
    folder = Path(run(["fit", *line]).trainer.log_dir)
    fitted = _curves(folder)
    assert {"val/acc", "val/recon_rmse", "train/loss"} < fitted.keys()
    run(["validate", *line, "--ckpt_path=last"])
    assert _curves(folder) == fitted
    cli = run(["test", *line, "--ckpt_path=last"])
    tested = _curves(folder)
    assert {tag: points for tag, points in tested.items() if not tag.startswith("test/")} == fitted
    accuracy = float(cli.trainer.callback_metrics["test/acc"])
    assert tested["test/acc"] == [(10, pytest.approx(accuracy))]


def test_a_trial_of_a_few_batches_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run(
        [
            *("fit", "-c", "digits_h128", "-c", "progressive", "--model.rounds=1", "--trainer.fast_dev_run=true"),
            "--trainer.callbacks+=nernlit.callbacks.LowFrequencyEnergy",
        ]
    )
    assert list(tmp_path.iterdir()) == []


def test_a_fit_after_an_evaluation_of_a_checkpoint_may_be_shorter(tmp_path: Path) -> None:
    module, data = _recon(), DigitsDataModule(train_on="none", steps_per_epoch=4)
    longer = quiet_trainer(max_epochs=1)
    longer.fit(module, datamodule=data)
    longer.save_checkpoint(tmp_path / "last.ckpt")
    quiet_trainer().test(module, datamodule=data, ckpt_path=tmp_path / "last.ckpt", verbose=False)
    shorter = quiet_trainer(max_steps=2)
    shorter.fit(module, datamodule=data)
    assert shorter.global_step == 2
