"""Images in as many channels as the original takes, from every dataset."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

from nernlit.data import (
    CIFAR10C,
    CIFAR10DataModule,
    Corrupted,
    DigitsDataModule,
    FolderDataModule,
    ImageDataModule,
    STL10DataModule,
)
from nernlit.data.channels import to_channels
from nernlit.data.sources import InChannels, TensorImages
from nernlit.errors import DataError
from nernlit.originals import Original
from nernlit.predictors import MLP
from nernlit.representation import Representation
from nernlit.training import ReconOnly
from tests.fakes import (
    quiet_trainer,
    without_hashes,
    write_cifar10,
    write_cifar_c,
    write_image_folder,
    write_stl10,
)


def test_channels_are_converted_as_pil_converts_files() -> None:
    colors = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), dtype=np.uint8)
    images = torch.from_numpy(colors).permute(0, 3, 1, 2)
    expected = np.stack([np.asarray(Image.fromarray(image).convert("L")) for image in colors])
    gray = to_channels(images, 1)
    assert np.array_equal(gray[:, 0].numpy(), expected)
    assert torch.equal(to_channels(gray, 3), gray.repeat(1, 3, 1, 1))
    assert torch.equal(to_channels(to_channels(gray, 3), 1), gray)
    assert torch.equal(to_channels(images, 3), images)
    with_alpha = to_channels(images, 4)
    assert torch.equal(with_alpha[:, :3], images)
    assert (with_alpha[:, 3] == 255).all()
    assert torch.equal(to_channels(with_alpha, 3), images)
    assert torch.equal(to_channels(with_alpha, 1), gray)
    assert torch.equal(to_channels(gray, 4)[:, :3], gray.repeat(1, 3, 1, 1))


def test_channels_that_nobody_has_defined_are_refused() -> None:
    with pytest.raises(DataError, match="images of 2 channels cannot be read in 3; expected 1, 3 or 4 channels"):
        to_channels(torch.zeros(1, 2, 4, 4, dtype=torch.uint8), 3)
    data = DigitsDataModule()
    data.channels = 7
    with pytest.raises(DataError, match="the original takes images of 7 channels; data modules read images in 1"):
        data.setup("test")


def test_a_converted_source_is_converted_however_it_is_read() -> None:
    images = torch.randint(0, 256, (6, 3, 4, 4), dtype=torch.uint8)
    source = InChannels(TensorImages(images, torch.arange(6)), 1)
    expected = to_channels(images, 1)
    assert torch.equal(source[[4, 0]][0], expected[[4, 0]])
    assert source[[4, 0]][1].tolist() == [4, 0]
    assert torch.equal(source.subset(torch.tensor([5, 1]))[[0]][0], expected[[5]])
    assert torch.equal(source.in_memory().images, expected)
    assert len(source) == 6


def _representation(channels: int) -> Representation:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(channels, 8, 3, stride=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
    return Representation(
        Original.from_module(net, 10, mean=[0.5], std=[0.25]), MLP(8, num_frequencies=4), order="none"
    )


def _folder(root: Path) -> ImageDataModule:
    return FolderDataModule(str(write_image_folder(root, 10, 4)), eval_sets=[Corrupted(["jpeg"], [1])])


def _cifar10(root: Path) -> ImageDataModule:
    published = CIFAR10C(str(write_cifar_c(root / "c", ("fog",), 10)), ["fog"], [1])
    return CIFAR10DataModule(str(write_cifar10(root)), eval_sets=[published])


def _stl10(root: Path) -> ImageDataModule:
    return STL10DataModule(str(write_stl10(root)), eval_sets=[Corrupted(["contrast"], [1])])


def _digits(root: Path) -> ImageDataModule:
    return DigitsDataModule(eval_sets=[Corrupted(["jpeg", "saturation"], [1])])


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("make", [_folder, _cifar10, _stl10, _digits])
def test_every_dataset_serves_originals_of_any_channels(
    make: Callable[[Path], ImageDataModule], channels: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_hashes(monkeypatch)
    data = make(tmp_path)
    representation = _representation(channels)
    trainer = quiet_trainer()
    trainer.test(ReconOnly(representation, optimizer=torch.optim.Adam), data, verbose=False)
    data.setup("fit")
    assert data.channels == channels
    assert len(data.mean) == len(data.std) == channels
    sources = [*data.sources.values(), *(condition.source for condition in data.conditions)]
    assert len(sources) >= 4
    assert {source[[0]][0].shape[1] for source in sources} == {channels}
    clean = data.sources["test"]
    images, labels = clean[range(len(clean))]
    expected = (representation.original(images.float() / 255).argmax(1) == labels).float().mean()
    assert float(trainer.callback_metrics["test/acc_original"]) == pytest.approx(float(expected))


def test_gray_files_reach_a_gray_cnn_as_they_are(tmp_path: Path) -> None:
    level = iter(range(100))
    for split in ("train", "test"):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(3):
                Image.new("L", (8, 8), next(level)).save(tmp_path / split / name / f"{number}.png")
    data = FolderDataModule(str(tmp_path))
    data.channels = 1
    data.setup("test")
    assert data.sources["test"].images[:, 0, 0, 0].tolist() == list(range(6, 12))  # type: ignore[attr-defined]
    # Another network, other channels: what was read for the first is not used again.
    data.network = Original.from_module(timm.create_model("test_resnet", num_classes=2), 2, mean=[0.5], std=[0.5])
    data.setup("test")
    assert data.sources["test"][[0]][0].shape == (1, 3, 8, 8)
    data.network = Original.from_module(timm.create_model("test_resnet", num_classes=5), 5, mean=[0.5], std=[0.5])
    with pytest.raises(DataError, match="FolderDataModule has 2 classes, but the original has 5; use the data it was"):
        data.setup("test")


def test_noise_has_the_channels_of_the_original(tmp_path: Path) -> None:
    data = FolderDataModule(
        str(write_image_folder(tmp_path, 10, 2)), train_on="noise", batch_size=400, steps_per_epoch=1, noise_range=1.0
    )
    seen = []

    class Listening(ReconOnly):  # type: ignore[misc]
        def training_step(self, batch, batch_idx):  # type: ignore[no-untyped-def]
            seen.append(batch[0])
            return super().training_step(batch, batch_idx)

    module = Listening(_representation(1), optimizer=torch.optim.Adam)
    quiet_trainer(max_epochs=1, limit_val_batches=1).fit(module, datamodule=data)
    (noise,) = seen
    mean, std = sum((0.485, 0.456, 0.406)) / 3, sum((0.229, 0.224, 0.225)) / 3
    assert noise.shape == (400, 1, 32, 32)
    assert float(noise.mean()) == pytest.approx(mean, abs=0.002)
    assert float(noise.max()) == pytest.approx(mean + std, abs=0.002)
