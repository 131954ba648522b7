"""The same seed gives the same weights to the bit, on the same machine and with the same number of threads."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from nernlit.training import Rate
from tests.training.ddp.cases import SCHEMES
from tests.training.ddp.fits import fit, images, representation, scheme, trainer_of
from tests.training.ddp.group import Group


def _fitted(name: str, predictor: str, seed: int, folder: Path) -> dict[str, Any]:
    L.seed_everything(seed, verbose=False)
    group = Group(folder, processes=1, rank=0, case=name)
    rate = {"rate": Rate(weight=0.1)} if predictor.endswith("_quantized") and name != "progressive" else {}
    module = scheme(name, representation(predictor), group.batch_size, **rate)
    augmentation = {"pad_crop": 1, "flip": True, "mixup": 0.3} if module.trains_on_images else {}
    outcome = fit(module, images(group, module, **augmentation), trainer_of(group))
    outcome["state"] = {key: value for key, value in module.state_dict().items() if isinstance(value, torch.Tensor)}
    return outcome


@pytest.mark.parametrize("predictor", ["mlp", "table_quantized", "codebooks"])
@pytest.mark.parametrize("name", SCHEMES)
def test_two_fits_with_the_same_seed_are_equal_to_the_bit(name: str, predictor: str, tmp_path: Path) -> None:
    first, second = (_fitted(name, predictor, 3, tmp_path) for _ in range(2))
    assert first["state"].keys() == second["state"].keys()
    for key, value in first["state"].items():
        assert torch.equal(value, second["state"][key]), key
    assert first["figures"] == second["figures"]
    assert first["rounds"] == second["rounds"]


@pytest.mark.parametrize("name", SCHEMES)
def test_another_seed_gives_other_weights(name: str, tmp_path: Path) -> None:
    first, other = (_fitted(name, "mlp", seed, tmp_path)["state"] for seed in (3, 4))
    assert not any(torch.equal(value, other[key]) for key, value in first.items() if "weight" in key)
