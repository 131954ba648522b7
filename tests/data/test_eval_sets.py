from collections.abc import Callable
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
    data = DigitsDataModule(eval_sets=[Corrupted(["contrast"], [3]), Corrupted(["contrast"], [3], seed=1)])
    with pytest.raises(UsageError, match="eval_sets: corrupted contrast_3 occurs twice"):
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
    write_cifar_c(tmp_path, ("fog", "spatter"), each=6)
    clean = TensorImages(_images(), torch.arange(6))
    conditions = CIFAR10C(str(tmp_path), ["fog", "spatter"], severities=[1, 3]).conditions(clean, 10)
    assert list(conditions) == ["fog_1", "fog_3", "spatter_1", "spatter_3"]
    whole = np.load(tmp_path / "fog.npy")
    pixels, labels = conditions["fog_3"][[3, 0]]
    assert np.array_equal(pixels.permute(0, 2, 3, 1).numpy(), whole[[15, 12]])
    assert labels.tolist() == np.load(tmp_path / "labels.npy")[[15, 12]].tolist()
    assert isinstance(conditions["fog_1"].images, np.memmap)  # type: ignore[attr-defined]
    assert torch.equal(conditions["fog_3"].in_memory().images[[3, 0]], pixels)
    # Stored column by column, or in another byte order, the file says the same.
    np.save(tmp_path / "fog.npy", np.asfortranarray(whole))
    np.save(tmp_path / "labels.npy", np.load(tmp_path / "labels.npy").astype(">u2"))
    again, same = CIFAR10C(str(tmp_path), ["fog"], severities=[3]).conditions(clean, 10)["fog_3"][[3, 0]]
    assert torch.equal(again, pixels)
    assert torch.equal(same, labels)


def _refused_cifar_c(root: Path, message: str) -> None:
    clean = TensorImages(_images(), torch.arange(6))
    with pytest.raises(DataError, match=message) as caught:
        CIFAR10C(str(root), ["fog"]).conditions(clean, 10)
    assert "Unpack CIFAR-10-C.tar (https://zenodo.org/records/2535967)" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_cifar_c_of_other_classes_or_corruptions_is_refused(tmp_path: Path) -> None:
    clean = TensorImages(_images(), torch.arange(6))
    for kind, classes, given in ((CIFAR10C, 10, 100), (CIFAR100C, 100, 10)):
        with pytest.raises(DataError, match=f"CIFAR-{classes}-C has {classes} classes, the data has {given}"):
            kind(str(tmp_path)).conditions(clean, given)
    with pytest.raises(UsageError, match="CIFAR-10-C has no smoke, 0; expected"):
        CIFAR10C(str(tmp_path), ["smoke"], severities=[0, 1])
    for empty in ({"corruptions": []}, {"severities": []}):
        with pytest.raises(UsageError, match="CIFAR-10-C was given an empty list; expected corruptions out of"):
            CIFAR10C(str(tmp_path), **empty)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [6, 24, 29, 31, 60])
def test_cifar_c_must_have_five_severities_of_every_clean_image(size: int, tmp_path: Path) -> None:
    np.save(tmp_path / "fog.npy", np.zeros((size, 32, 32, 3), np.uint8))
    np.save(tmp_path / "labels.npy", np.arange(size) % 6)
    _refused_cifar_c(tmp_path, rf"labels.npy is int64 of shape \({size},\); expected integers of shape \(30,\)")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.tile(np.arange(6), 5) + 0.5, r"is float64 of shape \(30,\); expected integers"),
        (np.tile(np.arange(6), 5)[:, None], r"is int64 of shape \(30, 1\); expected integers"),
        (np.tile(np.arange(6), 5) - 1, "has labels from -1 to 4; expected 0 to 9"),
        (np.tile(np.arange(6), 5) + 5, "has labels from 5 to 10; expected 0 to 9"),
        (np.repeat(np.arange(6), 5), "has other labels at severity 2, 3, 4, 5 than at severity 1"),
        (np.tile([0, 0, 2, 3, 4, 5], 5), "does not have the labels of the clean test images"),
    ],
)
def test_cifar_c_with_wrong_labels_is_refused(labels: np.ndarray, message: str, tmp_path: Path) -> None:
    write_cifar_c(tmp_path, ("fog",), each=6)
    np.save(tmp_path / "labels.npy", labels)
    _refused_cifar_c(tmp_path, f"labels.npy {message}")


def test_cifar_c_takes_clean_images_in_another_order(tmp_path: Path) -> None:
    write_cifar_c(tmp_path, ("fog",), each=6)
    sorted_by_folder = TensorImages(_images(), torch.tensor([5, 4, 3, 2, 1, 0]))
    conditions = CIFAR10C(str(tmp_path), ["fog"], severities=[1]).conditions(sorted_by_folder, 10)
    assert conditions["fog_1"].labels.tolist() == [0, 1, 2, 3, 4, 5]


def _npz(path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, images=np.zeros(3))


def _pickled(path: Path) -> None:
    np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)


def _huge_header(path: Path) -> None:
    np.save(path, np.zeros(3))
    path.write_bytes(path.read_bytes().replace(b"(3,), ", b"(3" + b"0" * 3 + b"),"))


@pytest.mark.parametrize("name", ["fog", "labels"])
@pytest.mark.parametrize(
    "write",
    [
        lambda path: path.unlink(),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:-100]),
        lambda path: path.write_bytes(path.read_bytes()[:20]),
        lambda path: path.write_text("<!DOCTYPE html>\n<html>not found</html>"),
        lambda path: path.write_bytes(b"\x93NUMPY\x01\x00\x10\x00{'descr': (((((\n"),
        _npz,
        _pickled,
        _huge_header,
    ],
    ids=["missing", "empty", "truncated", "header only", "html", "broken header", "npz", "pickle", "too short"],
)
def test_cifar_c_files_that_cannot_be_read_are_named(
    name: str, write: Callable[[Path], object], tmp_path: Path
) -> None:
    write_cifar_c(tmp_path, ("fog",), each=6)
    write(tmp_path / f"{name}.npy")
    _refused_cifar_c(tmp_path, rf"cannot read {tmp_path}/{name}.npy \(.+\)\.")


def test_cifar_c_of_another_image_size_is_refused(tmp_path: Path) -> None:
    write_cifar_c(tmp_path, ("fog",), each=6)
    np.save(tmp_path / "fog.npy", np.zeros((30, 3, 32, 32), np.uint8))
    _refused_cifar_c(tmp_path, r"fog.npy is uint8 of shape \(30, 3, 32, 32\); expected uint8 of \(30, 32, 32, 3\)")
    np.save(tmp_path / "fog.npy", np.zeros((30, 32, 32, 3), np.float32))
    _refused_cifar_c(tmp_path, "fog.npy is float32 of shape")


def test_imagenet_r_knows_its_classes_places_among_the_thousand(tmp_path: Path) -> None:
    from importlib.resources import files

    from timm.data import ImageNetInfo

    ids = (files("timm.data") / "_info" / "imagenet_r_synsets.txt").read_text().split()
    published = [int(n) for n in (files("timm.data") / "_info" / "imagenet_r_indices.txt").read_text().split()]
    write_image_folder(tmp_path, classes=200, each=1, splits=("r",), names=ids)
    eval_set = ImageNetR(str(tmp_path / "r"), model="test_resnet")
    clean = TensorImages(_images(), torch.arange(6))
    (condition, source), *others = eval_set.conditions(clean, 1000).items()
    assert not others
    assert condition == "renditions"
    assert eval_set.classes is not None
    assert eval_set.classes.tolist() == published
    pixels, labels = source[[0, 199]]
    assert pixels.shape == (2, 3, 160, 160)
    every = ImageNetInfo().label_names()
    assert [every[label] for label in labels.tolist()] == [sorted(ids)[0], sorted(ids)[199]]
    with pytest.raises(DataError, match="ImageNet-R has 200 of ImageNet's 1,000 classes, and the data has 10"):
        eval_set.conditions(clean, 10)
    (tmp_path / "r" / ids[1] / "0.png").rename(tmp_path / "r" / ids[1] / "0.txt")
    with (
        pytest.warns(UserWarning, match=r"ignored files that are not images: 1 \.txt"),
        pytest.raises(DataError, match=rf"no image in {ids[1]} \(1 of 200 classes\)"),
    ):
        eval_set.conditions(clean, 1000)
    (tmp_path / "r" / ids[0]).rename(tmp_path / "r" / "n00000000")
    with pytest.raises(DataError, match=r"has 200 class folders, 199 of them ImageNet-R's 200; unpack imagenet-r.tar"):
        eval_set.conditions(clean, 1000)


def test_only_colors_of_images_with_alpha_are_corrupted() -> None:
    images = _images(channels=4)
    for name in CORRUPTIONS:
        corrupted = corrupt(images, name, 3, 0, range(6))
        assert torch.equal(corrupted[:, 3], images[:, 3])
        assert torch.equal(corrupted[:, :3], corrupt(images[:, :3], name, 3, 0, range(6)))
