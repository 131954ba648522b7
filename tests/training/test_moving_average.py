from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor, nn

from nernlit.data import DigitsDataModule
from nernlit.errors import CheckpointError, UsageError
from nernlit.losses import reconstruction_rmse
from nernlit.originals import Original
from nernlit.predictors import Codebooks, Quantize, Table
from nernlit.representation import Representation
from nernlit.training import DecoupledDistill, ReconstructionPhase
from nernlit.training.moving_average import MovingAverage
from tests.fakes import digits_representation, quiet_trainer


def _adam(params: Iterator[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, lr=1e-2)


class Record(L.Callback):
    """Keep all parameters after each step, and a checkpoint of the last validation."""

    def __init__(self) -> None:
        self.values: list[dict[str, Tensor]] = []
        self.checkpoint: dict[str, Any] = {}

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object) -> None:
        self.values.append({name: p.detach().clone() for name, p in pl_module.named_parameters()})

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, DecoupledDistill)
        self.checkpoint = {"state_dict": dict(pl_module.state_dict())}
        pl_module.average.save(self.checkpoint)


def _table() -> Representation:
    original = Original("digits_resnet8", pretrained=True)
    return Representation(original, Table(), order="none", quantize=Quantize(4.0), tune_kept="affine")


@pytest.mark.parametrize("build", [digits_representation, _table])
def test_a_fit_evaluates_and_saves_the_average_of_phase_2_and_trains_the_last_values(build: Any) -> None:
    fits = []
    for ema in (0.8, 0.0):
        torch.manual_seed(0)
        phase_1 = ReconstructionPhase(2)
        module = DecoupledDistill(build(), optimizer=_adam, reconstruction=phase_1, ema=ema, precision="fp32")
        record = Record()
        trainer = quiet_trainer(max_epochs=2, num_sanity_val_steps=0, callbacks=[record])
        trainer.fit(module, datamodule=DigitsDataModule(batch_size=500))
        fits.append((module, record))
    (module, record), (_, plain) = fits
    assert len(record.values) == 4
    for values, others in zip(record.values, plain.values, strict=True):
        assert all(torch.equal(values[name], others[name]) for name in values)
    _, _, third, fourth = record.values
    for name, parameter in module.named_parameters():
        assert torch.allclose(parameter, 0.8 * third[name] + 0.2 * fourth[name], atol=1e-6), name
        assert torch.equal(record.checkpoint["state_dict"][name], parameter), name
        assert torch.equal(record.checkpoint["moving_average"]["last"][name], fourth[name]), name
    representation = module.representation
    pair = [representation.layout.vector(w) for w in (representation.weights(), representation.original_weights())]
    error = float(reconstruction_rmse(*pair).detach())
    assert float(module.trainer.callback_metrics["val/recon_rmse"]) == pytest.approx(error, rel=1e-5)
    assert "moving_average" not in plain.checkpoint


def test_the_average_matches_a_sum_over_steps_and_is_exchanged_with_the_last_values() -> None:
    parameter, average = nn.Parameter(torch.zeros(3)), MovingAverage(0.9)
    named = {"p": parameter}
    average.show(named, True)
    assert torch.equal(parameter, torch.zeros(3))  # there is none yet
    values = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    for value in values:
        parameter.data.copy_(value)
        average.update(named)
    expected = 0.9**5 * values[0] + sum(0.1 * 0.9 ** (5 - step) * values[step] for step in range(1, 6))
    checkpoints: list[dict[str, Any]] = []
    for shown in (True, True, False):
        average.show(named, shown)
        assert torch.allclose(parameter, expected) if shown else torch.equal(parameter, values[-1])
        checkpoints.append({"state_dict": {"p": parameter.detach().clone()}})
        average.save(checkpoints[-1])
    for checkpoint in checkpoints:
        assert torch.allclose(checkpoint["state_dict"]["p"], expected)
        assert torch.equal(checkpoint["moving_average"]["last"]["p"], values[-1])
    resumed = MovingAverage(0.9)
    resumed.load(checkpoints[0])
    assert torch.equal(checkpoints[0]["state_dict"]["p"], values[-1])
    resumed.show(named, True)
    assert torch.allclose(parameter, expected)


def test_a_fit_is_resumed_with_its_own_decay_and_other_uses_are_refused(tmp_path: Path) -> None:
    data = DigitsDataModule(batch_size=500)
    with pytest.raises(UsageError, match=r"ema=1\.0; expected a decay of at least 0 and below 1, for example 0\.99\."):
        DecoupledDistill(digits_representation(), optimizer=_adam, ema=1.0)
    moving = Representation(Original("digits_resnet8", pretrained=True), Codebooks(1, 2, move=0.1), order="none")
    with pytest.raises(
        UsageError, match=r"ema=0\.9 would average codewords whose codes change \(the predictor's move\)"
    ):
        DecoupledDistill(moving, optimizer=_adam, ema=0.9)
    phase_1 = ReconstructionPhase(1)
    module = DecoupledDistill(digits_representation(), optimizer=_adam, reconstruction=phase_1, ema=0.9)
    with pytest.raises(
        UsageError, match="EMAWeightAveraging would average parameters that `ema` already averages; pass ema: 0, or"
    ):
        quiet_trainer(max_steps=2, callbacks=[EMAWeightAveraging()]).fit(module, datamodule=data)
    trainer = quiet_trainer(max_steps=2)
    trainer.fit(module, datamodule=data)
    trainer.save_checkpoint(tmp_path / "fit.ckpt")
    other = DecoupledDistill(digits_representation(), optimizer=_adam, reconstruction=phase_1)
    with pytest.raises(
        CheckpointError, match=r"the checkpoint's fit had ema 0\.9, this one has 0\.0; pass the same, or"
    ):
        quiet_trainer(max_steps=3).fit(other, datamodule=data, ckpt_path=tmp_path / "fit.ckpt")
    state = torch.load(tmp_path / "fit.ckpt", weights_only=True)["state_dict"]
    for name, parameter in module.named_parameters():
        assert torch.equal(state[name], parameter), name
