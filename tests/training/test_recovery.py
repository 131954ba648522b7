"""Fits that diverge and go on from their last good state, with half the learning rate."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from nernlit.callbacks import DurableCheckpointIO, LearningRate
from nernlit.cli.main import main, run
from nernlit.data import DigitsDataModule
from nernlit.errors import DivergenceError, UsageError
from nernlit.kernels import Uniform
from nernlit.optimizers import Ranger, WarmupCosine
from nernlit.optimizers.ranger21 import Ranger21
from nernlit.storage.checkpoint import read_checkpoint
from nernlit.training import BaselineJoint, DecoupledDistill, Progressive, ReconOnly, ReconstructionPhase, Scheme
from tests.fakes import QUICK, PowerCut, digits_representation, quiet_trainer
from tests.training.test_divergence import Poison

RESTART: dict[str, Any] = {"on_divergence": "restart"}


def _momentum(params: Iterator[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1, momentum=0.9)


def _recon() -> Scheme:
    return ReconOnly(digits_representation(), _momentum, WarmupCosine, Uniform(64), **RESTART)


def _ranger() -> Scheme:
    return ReconOnly(digits_representation(), lambda params: Ranger(params, 0.01), sampling=Uniform(64), **RESTART)


def _joint() -> Scheme:
    return BaselineJoint(digits_representation(), _momentum, sampling=Uniform(64), **RESTART)


def _decoupled() -> Scheme:
    phase = ReconstructionPhase(4, _momentum, WarmupCosine, Uniform(64))
    return DecoupledDistill(digits_representation(), optimizer=_momentum, reconstruction=phase, ema=0.5, **RESTART)


def _progressive() -> Scheme:
    return Progressive(
        digits_representation(),
        optimizer=_momentum,
        sampling=Uniform(64),
        rounds=2,
        trials=2,
        min_delta=None,
        **RESTART,
    )


SCHEMES: dict[str, Callable[[], Scheme]] = {
    "recon": _recon,
    "ranger": _ranger,
    "joint": _joint,
    "decoupled": _decoupled,
    "progressive": _progressive,
}


class SaveAndStop(L.Callback):
    """Saves a checkpoint after so many batches, as a signal would, and ends the fit."""

    def __init__(self, after_batch: int) -> None:
        self.after_batch = after_batch

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.fit_loop.total_batch_idx + 1 == self.after_batch:
            trainer.save_checkpoint("checkpoints/last.ckpt")

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.fit_loop.total_batch_idx == self.after_batch:
            raise ConnectionAbortedError("stopped")


def _fit(name: str, callbacks: Sequence[L.Callback], checkpoint: str | None = None, **options: Any) -> Scheme:
    torch.manual_seed(0)
    module = SCHEMES[name]()
    images = name in ("joint", "decoupled")
    data = DigitsDataModule(batch_size=400) if images else DigitsDataModule(train_on="none", steps_per_epoch=3)
    checkpoints = ModelCheckpoint("checkpoints", "last", save_on_train_epoch_end=True, enable_version_counter=False)
    trainer = quiet_trainer(
        max_epochs=4,
        num_sanity_val_steps=0,
        enable_checkpointing=True,
        callbacks=[*callbacks, checkpoints],
        plugins=[DurableCheckpointIO()],
        **options,
    )
    trainer.fit(module, data, ckpt_path=checkpoint)
    return module


def _poisons(name: str, *batches: int) -> list[L.Callback]:
    prefix = "trial_predictors." if name == "progressive" else "representation.predictor."
    return [Poison(batch, prefix) for batch in batches]


def _state(module: Scheme) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.named_parameters()}


@pytest.mark.filterwarnings("ignore:the fit has diverged")
@pytest.mark.parametrize("name", SCHEMES)
def test_a_fit_that_was_restarted_and_resumed_ends_with_the_same_weights(name: str) -> None:
    stops = {"recon": [PowerCut(7), SaveAndStop(5), SaveAndStop(8)], "decoupled": [PowerCut(7), SaveAndStop(5)]}
    batches = (2, 5, 10)  # before the first epoch's end, in a stage's second step, and later
    whole = _fit(name, _poisons(name, *batches))
    assert whole.recovery.restarts == 3
    expected = _state(whole)
    assert all(bool(value.isfinite().all()) for value in expected.values())
    for interruption in stops.get(name, [SaveAndStop(8)]):
        with pytest.raises(ConnectionAbortedError):
            _fit(name, [*_poisons(name, *batches), interruption])
        resumed = _fit(name, _poisons(name, *batches), "checkpoints/last.ckpt")
        assert resumed.recovery.restarts == 3
        for key, value in _state(resumed).items():
            assert torch.equal(value, expected[key]), (interruption, key)


class Record(L.Callback):
    """Keeps a parameter after each step, and its gradients."""

    def __init__(self) -> None:
        self.values: list[Tensor] = []
        self.gradients: list[Tensor] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.parameter = next(pl_module.representation.predictor.parameters())  # type: ignore[union-attr]

    def on_before_optimizer_step(self, *_: Any) -> None:
        assert self.parameter.grad is not None
        self.gradients.append(self.parameter.grad.clone())

    def on_train_batch_end(self, *_: Any) -> None:
        self.values.append(self.parameter.detach().clone())


def test_the_next_step_starts_from_the_last_good_state_with_half_the_learning_rate() -> None:
    record = Record()
    module = ReconOnly(
        digits_representation(), lambda params: torch.optim.SGD(params, lr=0.5), sampling=Uniform(64), **RESTART
    )
    trainer = quiet_trainer(
        max_epochs=3,
        num_sanity_val_steps=0,
        callbacks=[Poison(4), Poison(5), record, LearningRate()],
        logger=TensorBoardLogger("runs"),
        log_every_n_steps=1,
    )
    message = (
        r"the fit has diverged: at step 4 train/recon is nan \(learning rate 0\.5\); "
        r"continuing from the state after step 3 "
        r"with 0\.5 times the learning rate \(restart 1 of at most 5\)\."
    )
    with pytest.warns(UserWarning, match=message):
        trainer.fit(module, DigitsDataModule(train_on="none", steps_per_epoch=3))
    good = record.values[2]
    for step, rate in ((4, 0.25), (5, 0.125)):
        assert torch.equal(record.values[step], good - rate * record.gradients[step])
    assert torch.equal(record.values[6], record.values[5] - 0.125 * record.gradients[6])
    events = EventAccumulator(str(trainer.log_dir)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("restarts")] == [(4, 1), (5, 2)]
    # A step's rate is logged before the step shows that it is too high.
    assert [event.value for event in events.Scalars("lr")] == [0.5, 0.5, 0.5, 0.5, 0.5, 0.25, 0.125, 0.125, 0.125]


@pytest.mark.filterwarnings("ignore:the fit has diverged")
def test_accumulated_gradients_of_the_diverged_parameters_are_dropped() -> None:
    module = _fit("recon", _poisons("recon", 7), accumulate_grad_batches=2)
    assert module.recovery.restarts == 1
    assert all(bool(value.isfinite().all()) for value in _state(module).values())


class Spoil(L.Callback):
    """Makes the parameters infinite after the last batch of an epoch."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if trainer.is_last_batch and trainer.current_epoch == self.epoch:
            for parameter in pl_module.parameters():
                parameter.data.fill_(torch.inf)


@pytest.mark.filterwarnings("ignore:the fit has diverged")
@pytest.mark.parametrize("name", ["recon", "decoupled"])
def test_weights_that_an_epochs_last_step_spoiled_are_those_of_the_epoch_before(name: str) -> None:
    module = _fit(name, [Spoil(3)])
    assert module.recovery.restarts == 1
    before = read_checkpoint("checkpoints/last.ckpt")["state_dict"]
    assert all(bool(value.isfinite().all()) for value in before.values() if isinstance(value, Tensor))
    assert module.trainer.callback_metrics["val/recon_rmse"].isfinite()


def test_a_fit_that_diverges_again_and_again_ends_with_the_error() -> None:
    module = ReconOnly(digits_representation(), lambda params: torch.optim.SGD(params, lr=1e30), **RESTART)
    with (
        pytest.warns(UserWarning, match="restart 5 of at most 5"),
        pytest.raises(
            DivergenceError, match=r"train/recon is (inf|nan) \(learning rate 3\.125e\+28\), after 5 restarts"
        ),
    ):
        quiet_trainer(max_epochs=2, num_sanity_val_steps=0).fit(module, DigitsDataModule(train_on="none"))


@pytest.mark.parametrize("optimizer", [Ranger21, torch.optim.LBFGS])
def test_an_optimizer_that_cannot_be_restarted_is_refused_by_name(optimizer: Any) -> None:
    module = ReconOnly(digits_representation(), lambda params: optimizer(params, lr=0.1), **RESTART)
    with pytest.raises(
        UsageError, match=f"on_divergence=restart does not work with the optimizer {optimizer.__name__}"
    ):
        quiet_trainer(max_epochs=1, num_sanity_val_steps=0).fit(module, DigitsDataModule(train_on="none"))
    with pytest.raises(UsageError, match="on_divergence='wait'; expected one of stop, restart"):
        ReconOnly(digits_representation(), _momentum, on_divergence="wait")  # type: ignore[arg-type]


def test_a_fit_that_diverged_can_be_continued_with_restarts() -> None:
    fit = ["fit", *QUICK, f"--trainer.callbacks={Poison.__module__}.Poison", "--trainer.callbacks.before_batch=7"]
    with pytest.raises(SystemExit):
        main(fit)
    with pytest.warns(UserWarning, match=r"continuing from the state after step 5 with 0\.5 times the learning rate"):
        cli = run([*fit, "--ckpt_path=last", "--model.on_divergence=restart"])
    assert cli.trainer.global_step == 10
    assert cli.model.recovery.restarts == 1
    content = read_checkpoint(Path(str(cli.trainer.log_dir), "checkpoints", "last.ckpt"))
    assert content["recovery"] == {"restarts": 1}
    assert content["hyper_parameters"]["on_divergence"] == "restart"


@pytest.mark.filterwarnings("ignore:the fit has diverged")
@pytest.mark.parametrize("name", ["recon", "decoupled"])
def test_a_checkpoint_right_after_a_diverged_step_holds_the_state_of_the_restart(name: str) -> None:
    steps = ModelCheckpoint("checkpoints", "step-{step}", every_n_train_steps=1, save_top_k=-1)
    module = _fit(name, [Spoil(2), steps])
    assert module.recovery.restarts == 1
    for path in Path("checkpoints").glob("step-*.ckpt"):
        state = read_checkpoint(path)["state_dict"]
        assert all(bool(value.isfinite().all()) for value in state.values() if isinstance(value, Tensor))


def test_progressive_refuses_checkpoints_between_validations() -> None:
    steps = ModelCheckpoint("checkpoints", "step-{step}", every_n_train_steps=2, save_top_k=-1)
    with pytest.raises(UsageError, match="every_n_train_steps and train_time_interval of a checkpoint"):
        _fit("progressive", [steps])
