from pathlib import Path

import numpy as np
import pytest
import torch

from nernlit.data import CIFAR10C, CIFAR100C, Corrupted, DigitsDataModule, ImageNetR
from nernlit.data.corruptions import CORRUPTIONS, corrupt
from nernlit.data.sources import TensorImages
from nernlit.errors import DataError, UsageError
from tests.fakes import write_cifar_c, write_image_folder


def _images(count: int = 6, channels: int = 3, side: int = 32) -> torch.Tensor:
    smooth = torch.rand(count, channels, side // 4, side // 4, generator=torch.Generator().manual_seed(0))
    return (255 * torch.nn.functional.interpolate(smooth, size=side, mode="bilinear")).to(torch.uint8)


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize(("channels", "side"), [(3, 32), (1, 8), (3, 96)])
def test_a_corrupted_image_does_not_depend_on_its_batch(name: str, channels: int, side: int) -> None:
    images = _images(channels=channels, side=side)
    together = corrupt(images, name, 3, seed=5, numbers=range(6))
    assert together.dtype == torch.uint8
    assert together.shape == images.shape
    parts = [corrupt(images[i : i + 2], name, 3, seed=5, numbers=range(i, i + 2)) for i in (0, 2, 4)]
    assert torch.equal(together, torch.cat(parts))


@pytest.mark.parametrize("side", [8, 32])
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_severities_move_images_further_and_further(name: str, side: int) -> None:
    images = _images(side=side)
    errors = [
        float((corrupt(images, name, severity, 0, range(6)).float() - images).square().mean())
        for severity in range(1, 6)
    ]
    if name == "saturation":  # less of it at first, then more
        assert errors[0] < errors[1]
        assert errors[2] < errors[3] < errors[4]
    elif name in ("pixelate", "jpeg"):  # in blocks: what they cut through is chance
        assert errors[0] < errors[2] < errors[4]
    else:
        assert errors == sorted(errors)
    assert errors[0] > 0


def test_another_seed_is_other_noise_and_no_other_blur() -> None:
    images = _images()
    for name, same in (("gaussian_noise", False), ("impulse_noise", False), ("gaussian_blur", True)):
        assert torch.equal(corrupt(images, name, 2, 0, range(6)), corrupt(images, name, 2, 1, range(6))) == same


def test_a_condition_that_is_there_twice_is_refused() -> None:
    data = DigitsDataModule(test_sets=[Corrupted(["contrast"], [3]), Corrupted(["contrast"], [3], seed=1)])
    with pytest.raises(UsageError, match="test_sets: corrupted contrast_3 is there twice"):
        data.setup("test")


def test_corrupted_conditions_stream_the_clean_images() -> None:
    clean = TensorImages(_images(), torch.arange(6))
    conditions = Corrupted(["jpeg", "contrast"], severities=[1, 5]).conditions(clean, 10)
    assert list(conditions) == ["jpeg_1", "jpeg_5", "contrast_1", "contrast_5"]
    pixels, labels = conditions["contrast_5"][[4, 1]]
    assert torch.equal(pixels, corrupt(clean.images[[4, 1]], "contrast", 5, 0, [4, 1]))
    assert labels.tolist() == [4, 1]
    with pytest.raises(
        UsageError, match=r"Corrupted has no fog, 6; expected corruptions out of gaussian_noise, .* 1 to 5"
    ):
        Corrupted(["jpeg", "fog"], severities=[6])


def test_cifar_c_is_read_in_its_published_form(tmp_path: Path) -> None:
    write_cifar_c(tmp_path, ("fog", "spatter"), each=4)
    clean = TensorImages(_images(), torch.arange(6))
    conditions = CIFAR10C(str(tmp_path), ["fog", "spatter"], severities=[1, 3]).conditions(clean, 10)
    assert list(conditions) == ["fog_1", "fog_3", "spatter_1", "spatter_3"]
    whole = np.load(tmp_path / "fog.npy")
    pixels, labels = conditions["fog_3"][[3, 0]]
    assert np.array_equal(pixels.permute(0, 2, 3, 1).numpy(), whole[[11, 8]])
    assert labels.tolist() == np.load(tmp_path / "labels.npy")[[11, 8]].tolist()
    assert isinstance(conditions["fog_1"].images, np.memmap)  # type: ignore[attr-defined]
    assert torch.equal(conditions["fog_3"].in_memory().images[[3, 0]], pixels)


def test_cifar_c_that_is_missing_damaged_or_anothers_is_refused(tmp_path: Path) -> None:
    write_cifar_c(tmp_path, ("fog",), each=4)
    clean = TensorImages(_images(), torch.arange(6))

    def refused(message: str, kind: type[CIFAR10C] | type[CIFAR100C] = CIFAR10C, classes: int = 10) -> None:
        with pytest.raises(DataError, match=message):
            kind(str(tmp_path), ["fog"]).conditions(clean, classes)

    refused("CIFAR-10-C has 10 classes, the data has 100", classes=100)
    (tmp_path / "fog.npy").rename(tmp_path / "frog.npy")
    refused(r"cannot read .*fog.npy .*Unpack CIFAR-10-C.tar \(https://zenodo.org/records/2535967\)")
    (tmp_path / "fog.npy").write_bytes((tmp_path / "frog.npy").read_bytes()[:-100])
    refused(r"cannot read .*fog.npy")
    np.save(tmp_path / "fog.npy", np.zeros((20, 3, 32, 32), np.uint8))
    refused(r"fog.npy is uint8 of shape \(20, 3, 32, 32\); expected uint8 of \(20, 32, 32, 3\)")
    np.save(tmp_path / "labels.npy", np.full(20, 10))
    refused("labels.npy has shape .* and labels up to 10; expected 50,000 labels below 10")
    with pytest.raises(UsageError, match="CIFAR-10-C has no smoke; expected"):
        CIFAR10C(str(tmp_path), ["smoke"])


def test_imagenet_r_knows_its_classes_places_among_the_thousand(tmp_path: Path) -> None:
    from importlib.resources import files

    from timm.data import ImageNetInfo

    ids = (files("timm.data") / "_info" / "imagenet_r_synsets.txt").read_text().split()
    published = [int(n) for n in (files("timm.data") / "_info" / "imagenet_r_indices.txt").read_text().split()]
    write_image_folder(tmp_path, classes=200, each=1, splits=("r",), names=ids)
    test_set = ImageNetR(str(tmp_path / "r"), model="test_resnet")
    clean = TensorImages(_images(), torch.arange(6))
    (condition, source), *others = test_set.conditions(clean, 1000).items()
    assert not others
    assert condition == "renditions"
    assert test_set.classes is not None
    assert test_set.classes.tolist() == published
    pixels, labels = source[[0, 199]]
    assert pixels.shape == (2, 3, 160, 160)
    every = ImageNetInfo().label_names()
    assert [every[label] for label in labels.tolist()] == [sorted(ids)[0], sorted(ids)[199]]
    with pytest.raises(DataError, match="ImageNet-R has 200 of ImageNet's 1,000 classes, the data has 10"):
        test_set.conditions(clean, 10)
    (tmp_path / "r" / ids[0]).rename(tmp_path / "r" / "n00000000")
    with pytest.raises(DataError, match=r"has 200 class folders, 199 of them ImageNet-R's 200; unpack imagenet-r.tar"):
        test_set.conditions(clean, 1000)
