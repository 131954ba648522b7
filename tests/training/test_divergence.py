import re
from collections.abc import Callable, Iterator
from pathlib import Path

import lightning as L
import pytest
import torch
from torch import nn

from nernlit.cli.main import main, run
from nernlit.data import DigitsDataModule
from nernlit.errors import DivergenceError
from nernlit.kernels import Uniform
from nernlit.originals import Original
from nernlit.training import (
    BaselineJoint,
    ClassifierModule,
    DecoupledDistill,
    OriginalModule,
    Progressive,
    ReconOnly,
    ReconstructionPhase,
)
from nernlit.training.divergence import FiniteLossCheck
from tests.fakes import QUICK, digits_representation, quiet_trainer


def _sgd(rate: float) -> Callable[[Iterator[nn.Parameter]], torch.optim.Optimizer]:
    return lambda params: torch.optim.SGD(params, lr=rate)


class Poison(L.Callback):
    """Puts a NaN into parameters whose name begins with a prefix, before the given batch."""

    def __init__(self, before_batch: int, prefix: str = "representation.predictor.") -> None:
        self.before_batch, self.prefix = before_batch, prefix

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: object, _: int) -> None:
        if trainer.fit_loop.total_batch_idx == self.before_batch:
            for name, parameter in pl_module.named_parameters():
                if name.startswith(self.prefix):
                    parameter.data.flatten()[0] = torch.nan


def _poison(before_batch: int) -> list[str]:
    return [f"--trainer.callbacks={__name__}.Poison", f"--trainer.callbacks.before_batch={before_batch}"]


def test_a_diverging_fit_ends_with_its_step_term_and_learning_rate(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(
            ["fit", *QUICK, "--model.optimizer=torch.optim.SGD", "--model.optimizer.lr=1e12", "--model.scheduler=null"]
        )
    assert ended.value.code == 2
    said = capsys.readouterr()
    assert re.search(r"the fit has diverged: at step 1 train/recon is (inf|nan) \(learning rate 1e\+12\)", said.err)
    assert "accuracy" not in said.out
    assert not list(Path("runs").rglob("*.ckpt"))


@pytest.mark.parametrize("batch", [5, 7])
def test_the_last_good_checkpoints_are_kept(batch: int) -> None:
    with pytest.raises(DivergenceError, match=rf"at step {batch} train/recon is nan"):
        run(["fit", *QUICK, *_poison(batch)])
    files = {path.name: torch.load(path, weights_only=True) for path in Path("runs").rglob("*.ckpt")}
    assert files.keys() == {"best.ckpt", "last.ckpt"}
    for content in files.values():
        assert content["global_step"] == 5
        weights = [value for value in content["state_dict"].values() if isinstance(value, torch.Tensor)]
        assert all(bool(value.isfinite().all()) for value in weights)


def test_weights_that_the_last_step_spoiled_are_not_saved(tmp_path: Path) -> None:
    class Spoil(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object) -> None:
            next(pl_module.representation.predictor.parameters()).data.fill_(torch.inf)  # type: ignore[union-attr]

    module = ReconOnly(digits_representation(), _sgd(0.1))
    data = DigitsDataModule(train_on="none", steps_per_epoch=1)
    trainer = quiet_trainer(max_epochs=1, limit_val_batches=0, callbacks=[Spoil()])
    with pytest.raises(DivergenceError, match=r"after step 0 representation\.predictor\.first\.weight holds numbers"):
        trainer.fit(module, datamodule=data)
    with pytest.raises(DivergenceError):
        trainer.save_checkpoint(tmp_path / "bad.ckpt")
    assert not (tmp_path / "bad.ckpt").exists()


def _joint() -> ClassifierModule:
    return BaselineJoint(digits_representation(), _sgd(1e25), sampling=Uniform(64))


def _decoupled() -> ClassifierModule:
    return DecoupledDistill(
        digits_representation(), optimizer=_sgd(1e25), reconstruction=ReconstructionPhase(1, _sgd(0.1))
    )


def _progressive() -> ClassifierModule:
    return Progressive(digits_representation(), optimizer=_sgd(1e25), rounds=1)


def _original() -> ClassifierModule:
    return OriginalModule(Original("digits_resnet8"), _sgd(1e25))


@pytest.mark.parametrize("build", [_joint, _decoupled, _progressive, _original])
def test_every_scheme_that_diverges_says_so(build: Callable[[], ClassifierModule]) -> None:
    data = DigitsDataModule(batch_size=32)
    trainer = quiet_trainer(max_epochs=1, limit_train_batches=6)
    with pytest.raises(DivergenceError, match="the fit has diverged"):
        trainer.fit(build(), datamodule=data)
    assert not any(name.startswith("val/acc") for name in trainer.callback_metrics)


def test_steps_that_are_checked_together_name_the_first_that_failed() -> None:
    watch = FiniteLossCheck(at_once=False, joined=lambda flags: flags)
    for step in range(10):
        value = torch.tensor(torch.inf if step >= 4 else 1.0)
        watch.record(step, 0.5, {"recon": torch.ones(()), "kd": value})
    with pytest.raises(DivergenceError, match=r"at step 4 train/kd is inf \(learning rate 0\.5\)"):
        watch.check()
    watch.check()  # each step once


def _chain(*poisoned: int) -> Progressive:
    torch.manual_seed(0)
    module = Progressive(digits_representation(), optimizer=_sgd(0.1), rounds=1, trials=3)
    callbacks = [Poison(2, f"trial_predictors.each.{trial}.") for trial in poisoned]
    data = DigitsDataModule(train_on="none", steps_per_epoch=3)
    quiet_trainer(max_epochs=2, callbacks=callbacks, gradient_clip_val=1.0, num_sanity_val_steps=0).fit(module, data)
    return module


def test_a_trial_that_diverges_loses_and_leaves_the_others_alone() -> None:
    whole = _chain()
    winner = whole.ended[0].trial
    module = _chain(winner)
    (ended,) = module.ended
    expected: list[float | None] = list(whole.ended[0].val_acc_trials)
    expected[winner] = None
    assert ended.val_acc_trials == expected
    assert ended.val_acc == max(acc for acc in expected if acc is not None)
    assert ended.trial != winner
    for trial in {0, 1, 2} - {winner}:
        for one, two in zip(
            whole.trial_predictors.each[trial].parameters(),
            module.trial_predictors.each[trial].parameters(),
            strict=True,
        ):
            assert torch.equal(one, two)
    assert torch.isfinite(module.representation.kernels()).all()
    with pytest.raises(DivergenceError, match="at step 2 train/recon is nan"):
        _chain(0, 1, 2)


@pytest.mark.parametrize("value", [float("nan"), 1e30])
@pytest.mark.parametrize("stage", ["validate", "test"])
def test_a_network_without_finite_logits_has_no_accuracy(value: float, stage: str) -> None:
    module = ReconOnly(digits_representation(), _sgd(0.1))
    with torch.no_grad():
        list(module.representation.predictor.parameters())[-1][4] = value
    trainer = quiet_trainer()
    with pytest.raises(DivergenceError, match=r"the network's weights or logits on the .* images are not finite"):
        getattr(trainer, stage)(module, datamodule=DigitsDataModule(), verbose=False)
    assert not any("acc" in name for name in trainer.callback_metrics)


class Overflow(L.Callback):
    """Makes logits overflow in the validation of one epoch; the parameters stay finite."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch
        self.accuracies: list[float] = []

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._bias = list(pl_module.representation.predictor.parameters())[-1]
        self._before = self._bias.detach().clone()
        if trainer.current_epoch == self.epoch:
            self._bias.data[4] = 1e30

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.accuracies.append(float(trainer.callback_metrics["val/acc"]))
        self._bias.data.copy_(self._before)


def _overflowing_fit(epoch: int) -> Overflow:
    module = ReconOnly(digits_representation(), _sgd(0.1))
    overflow = Overflow(epoch)
    trainer = quiet_trainer(max_epochs=2, num_sanity_val_steps=0, callbacks=[overflow])
    trainer.fit(module, datamodule=DigitsDataModule(train_on="none", steps_per_epoch=2))
    return overflow


def test_images_without_finite_logits_count_as_wrong_while_a_fit_goes_on() -> None:
    with pytest.warns(UserWarning, match="After step 1 the network's logits are not finite for some validation images"):
        overflow = _overflowing_fit(0)
    assert overflow.accuracies[0] == 0
    assert overflow.accuracies[1] > 0


def test_a_fit_does_not_end_with_a_network_without_finite_logits() -> None:
    with pytest.raises(DivergenceError, match="the network's weights or logits on the val images are not finite"):
        _overflowing_fit(1)


def test_a_network_that_is_not_finite_is_not_written() -> None:
    module = ReconOnly(digits_representation(), _sgd(0.1))
    list(module.representation.predictor.parameters())[-1].data[4] = torch.nan
    with pytest.raises(DivergenceError, match=r"conv1\.weight holds numbers that are not finite"):
        quiet_trainer().predict(module, datamodule=DigitsDataModule())


def test_a_process_that_is_well_does_not_name_its_own_value() -> None:
    watch = FiniteLossCheck(True, torch.zeros_like)  # another process has found something
    with pytest.raises(DivergenceError, match="at step 7 train/recon is not finite on another process"):
        watch.record(7, 0.1, {"recon": torch.tensor(0.5)})
