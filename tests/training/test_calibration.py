from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor, nn

from nernlit.data import DigitsDataModule, NoImages
from nernlit.errors import UsageError
from nernlit.kernels import Uniform
from nernlit.predictors import MLP
from nernlit.representation import Representation, calibrate, load_representation
from nernlit.training import DecoupledDistill, Progressive, ReconOnly, ReconstructionPhase
from tests.fakes import digits_representation, quiet_trainer


def _adam(params: Iterator[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, lr=1e-2)


def _digits(**options: Any) -> DigitsDataModule:
    return DigitsDataModule(**{"train_on": "none", "steps_per_epoch": 3, **options})


def _recon_only(**options: Any) -> ReconOnly:
    torch.manual_seed(0)
    original = digits_representation().original
    representation = Representation(original, MLP(16), tune_kept="affine")
    return ReconOnly(representation, _adam, sampling=Uniform(64), **{"calibration_images": 64, **options})


def _fitted(module: Any, data: Any = None, **options: Any) -> dict[str, Tensor]:
    """The trained kept tensors after a fit."""
    trainer = quiet_trainer(**{"max_epochs": 2, **options})
    trainer.fit(module, datamodule=data or _digits())
    return {key: value.detach().clone() for key, value in module.representation.tuned.named().items()}


@pytest.mark.parametrize("options", [{}, {"limit_val_batches": 0}, {"max_epochs": -1, "max_steps": 5}], ids=str)
def test_recon_only_ends_calibrated(options: dict[str, Any], tmp_path: Path) -> None:
    module = _recon_only()
    trainer = quiet_trainer(**{"max_epochs": 2, **options})
    trainer.fit(module, datamodule=(data := _digits()))
    found = {key: value.detach().clone() for key, value in module.representation.tuned.named().items()}
    calibrate(module.representation, data.training_images(64, 0))
    for key, value in module.representation.tuned.named().items():
        assert torch.equal(value, found[key]), key
        assert not torch.equal(value, module.representation.original.net.state_dict()[key]), key
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    again, _ = load_representation(tmp_path / "last.ckpt", _recon_only().representation)
    images = next(data.training_images(8, 1))
    assert torch.allclose(again(images), module.representation(images), atol=1e-5)


def test_averaged_predictors_are_not_calibrated() -> None:
    message = r"EMAWeightAveraging would average tensors that are calibrated for the predictor's last values \(calib"
    with pytest.raises(UsageError, match=message):
        _fitted(_recon_only(), callbacks=[EMAWeightAveraging()])


def test_a_second_fit_of_the_same_length_is_calibrated_too() -> None:
    module = _recon_only()
    _fitted(module, max_epochs=1)
    data = _digits()
    found = _fitted(module, data, max_epochs=1)
    calibrate(module.representation, data.training_images(64, 0))
    for key, value in module.representation.tuned.named().items():
        assert torch.equal(value, found[key]), key


def test_it_does_not_depend_on_the_seed_of_the_fit_or_of_the_data() -> None:
    assert all(
        map(torch.equal, _fitted(_recon_only()).values(), _fitted(_recon_only(), _digits(batch_size=7)).values())
    )


def test_decoupled_starts_its_second_phase_calibrated() -> None:
    """With a tiny learning rate in phase 2 the kept tensors stay as they were calibrated."""
    torch.manual_seed(0)
    original = digits_representation().original
    representation = Representation(original, MLP(16), tune_kept="affine")
    phase_1 = ReconstructionPhase(3, optimizer=_adam, sampling=Uniform(64))
    module = DecoupledDistill(
        representation,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1e-9),
        reconstruction=phase_1,
        calibration_images=64,
        precision="fp32",
    )
    data = _digits(train_on="images", steps_per_epoch=None, batch_size=500)
    found = _fitted(module, data)
    calibrate(representation, data.training_images(64, 0))
    for key, value in representation.tuned.named().items():
        assert torch.allclose(value, found[key], atol=1e-5), key
        assert not torch.equal(value, original.net.state_dict()[key]), key


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"calibration_images": -1}, "calibration_images=-1; expected at least 0"),
        ({"calibration_images": 0}, "pass --model.calibration_images 256, or leave"),
    ],
    ids=str,
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        _recon_only(**options)


def test_a_scheme_that_cannot_calibrate_does_not_advise_it() -> None:
    representation = Representation(digits_representation().original, MLP(16), tune_kept="affine")
    with pytest.raises(UsageError, match=r"Progressive uses none; leave --model\.representation\.tune_kept out"):
        Progressive(representation, optimizer=_adam, rounds=1)


def test_without_chosen_tensors_it_is_refused() -> None:
    with pytest.raises(UsageError, match="calibration_images=9 has no effect: no kept tensors are chosen; pass"):
        ReconOnly(digits_representation(), _adam, calibration_images=9)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (lambda: _digits(train_on="noise"), "calibration_images needs training images, and this fit is to use none"),
        (lambda: NoImages(3), "there are none"),
    ],
    ids=["noise", "no data"],
)
def test_it_needs_training_images(data: Callable[[], Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        _fitted(_recon_only(), data())
