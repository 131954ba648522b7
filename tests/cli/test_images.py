"""The images of `analyze` and `report` in batches, and networks on another device."""

import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nernlit.cli.analyze import main as analyze
from nernlit.cli.images import Batches, OnDevice, chosen_device
from nernlit.cli.report import main as report
from nernlit.data import FolderDataModule
from nernlit.data.augment import to_pixels
from nernlit.data.sources import FileImages
from nernlit.errors import DataError, UsageError
from tests.fakes import digits_representation, tiny_representation, write_image_folder


@pytest.fixture
def most_alive(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """The largest number of batches that were in memory at a time."""
    batches: list[weakref.ref[Tensor]] = []
    counts = [0]

    def watched(images: Tensor) -> Tensor:
        pixels = to_pixels(images)
        batches.append(weakref.ref(pixels))
        counts.append(sum(batch() is not None for batch in batches))
        return pixels

    monkeypatch.setattr("nernlit.data.base.to_pixels", watched)
    return lambda: max(counts)


@pytest.mark.parametrize("workers", [0, 1])
def test_every_pass_reads_all_images_and_holds_two_batches(
    workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most_alive: Callable[[], int]
) -> None:
    def refuse(self: FileImages) -> None:
        raise AssertionError("all images were decoded into memory")

    monkeypatch.setattr(FileImages, "in_memory", refuse)
    data = FolderDataModule(str(write_image_folder(tmp_path, 10, 20)), eval_batch_size=15, num_workers=workers)
    source = data.images("test")
    batches = Batches(data, source)
    for _ in range(2):
        labels = torch.cat([labels for _, labels in batches])
        assert labels.tolist() == [number // 20 for number in range(200)]
    assert len(batches) == 14
    assert most_alive() <= 2
    pixels, _ = next(iter(batches))
    assert torch.equal(pixels, to_pixels(source[list(range(15))][0]))
    assert data.images("train").labels.bincount().sum() == 180  # a tenth validates


def test_an_image_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (write_image_folder(tmp_path, 2, 3) / "test" / "class001" / "1.png").write_bytes(b"damaged")
    for workers in (0, 1):
        data = FolderDataModule(str(tmp_path), num_workers=workers)
        with pytest.raises(DataError, match=r"class001/1\.png is not a readable image"):
            list(Batches(data, data.images("test")))


def test_reports_and_analyses_hold_no_split(most_alive: Callable[[], int]) -> None:
    digits_representation().save("net.nern")
    data = ("--data=DigitsDataModule", "--data.eval_batch_size=20")
    report(["net.nern", *data])
    analyze(["landscape", "net.nern", "--points=2", "--batch_norm=reestimated", "--out=out", *data])
    assert most_alive() <= 3  # one in each of the two passes, and the next one


def test_a_network_on_a_device_is_that_of_the_representation() -> None:
    representation = tiny_representation(tune_kept="affine")
    with torch.no_grad():
        for value in representation.tuned.parameters():
            value.add_(0.5)
        images, weights = torch.rand(3, 1, 8, 8), representation.entries()
        network = OnDevice(representation.original, torch.device("cpu"))
        assert torch.equal(network(images, weights), representation(images, weights))
        assert torch.equal(network(images), representation.original(images))


def test_pixels_network_and_weights_are_moved_to_the_device() -> None:
    representation = tiny_representation()
    network = OnDevice(representation.original, torch.device("meta"))
    for weights in (None, representation.original_weights()):
        # Logits on torch's device without numbers cannot come back.
        with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
            network(torch.rand(3, 1, 8, 8), weights)
    assert representation.original.mean.device.type == "cpu"


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator")
def test_an_accelerator_gives_the_same_logits() -> None:
    representation, images = tiny_representation(), torch.rand(3, 1, 8, 8)
    with torch.no_grad():
        weights = representation.weights()
        found = OnDevice(representation.original, chosen_device(None))(images, weights)
        assert torch.allclose(found, representation(images, weights), atol=1e-4)


@pytest.mark.parametrize("command", [report, lambda args: analyze(["smooth", *args])])
def test_a_device_that_torch_cannot_use_is_refused(command: Callable[[list[str]], None]) -> None:
    for name in ("meta", "gpu", "xpu:7"):
        with pytest.raises(UsageError, match=rf"argument --device: {name} \(.*\); expected auto.* on this machine"):
            command(["net.nern", "--device", name])
    with pytest.raises(UsageError, match=r"unrecognized arguments: --trainer\.accelerator=cpu"):
        command(["net.nern", "--trainer.accelerator=cpu"])


def test_an_analysis_of_weights_takes_no_device() -> None:
    with pytest.raises(UsageError, match="`analyze layers` classifies no images; leave out --device"):
        analyze(["layers", "net.nern", "--device=cpu"])
    assert chosen_device(torch.device("cpu")).type == "cpu"
