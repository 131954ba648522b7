import http.client
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from nernlit.data import (
    CIFAR10DataModule,
    CIFAR100DataModule,
    Corrupted,
    DigitsDataModule,
    FolderDataModule,
    ImageDataModule,
    ImageNetDataModule,
    STL10DataModule,
)
from nernlit.data.augment import Augmentation, Draws, pad_crop_flip, resized_crop, to_pixels
from nernlit.data.batches import BatchSampler
from nernlit.data.cifar_classes import CIFAR100_CLASSES
from nernlit.data.decode import ResizeCenterCrop
from nernlit.errors import DataError, UsageError
from nernlit.training import ReconOnly
from nernlit.utilities.processes import Processes
from tests.fakes import (
    quiet_trainer,
    tiny_representation,
    without_hashes,
    write_cifar10,
    write_image_folder,
    write_stl10,
)


def _all_labels(loader: torch.utils.data.DataLoader[object]) -> list[int]:
    return [int(label) for _, labels in loader for label in labels]  # type: ignore[attr-defined, misc]


def test_digits_are_split_once_and_for_all() -> None:
    data = DigitsDataModule()
    data.setup("fit")
    data.setup("test")
    assert {name: len(source) for name, source in data.sources.items()} == {"train": 1293, "val": 144, "test": 360}
    again = DigitsDataModule()
    again.setup("validate")
    assert torch.equal(again.sources["val"].labels, data.sources["val"].labels)
    other = DigitsDataModule(split_seed=1)
    other.setup("validate")
    assert not torch.equal(other.sources["val"].labels, data.sources["val"].labels)


def test_pixels_are_a_copy_in_channels_last_format() -> None:
    images = torch.arange(0, 240, 5, dtype=torch.float32).view(2, 3, 2, 4)
    before = images.clone()
    pixels = to_pixels(images)
    assert torch.equal(pixels, before / 255)
    assert torch.equal(to_pixels(images.byte()), before / 255)
    assert torch.equal(images, before)
    assert pixels.is_contiguous(memory_format=torch.channels_last)


def test_image_files_are_batched_as_decoded_and_loaders_processes_start_no_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_image_folder(tmp_path, 4, 1)
    data = FolderDataModule(str(tmp_path), num_workers=1, eval_batch_size=4)
    data.setup("test")
    source = data._find({"test"})["test"]
    expected = source[[0, 1, 2, 3]][0]
    assert expected.is_contiguous(memory_format=torch.channels_last)
    monkeypatch.setattr("nernlit.data.sources.ThreadPoolExecutor", None)  # calling it fails
    loaded = next(iter(data.loader(source)))[0]
    assert torch.equal(loaded, expected)
    assert loaded.is_contiguous(memory_format=torch.channels_last)


def test_batches_are_pixels_between_0_and_1() -> None:
    data = DigitsDataModule(eval_batch_size=100)
    data.setup("validate")
    images, labels = data.on_after_batch_transfer(next(iter(data.val_dataloader())), 0)
    assert images.shape == (100, 1, 8, 8)
    assert images.dtype == torch.float32
    assert (float(images.min()), float(images.max())) == (0, 1)
    assert labels.dtype == torch.int64


def test_training_images_of_a_seed_are_the_same_with_and_without_training_on_images() -> None:
    found = []
    for train_on in ("images", "none"):
        data = DigitsDataModule(train_on=train_on, eval_batch_size=30, flip=True)  # type: ignore[arg-type]
        data.setup("fit")
        found.append(list(data.training_images(50, seed=3)))
        assert [len(batch) for batch in found[-1]] == [30, 20]
    assert torch.equal(torch.cat(found[0]), torch.cat(found[1]))
    data.setup("fit")
    every = torch.cat(list(data.training_images(10**6, seed=3)))
    assert len(every) == 1293
    assert torch.equal(every[:50], torch.cat(found[0]))
    assert not torch.equal(next(data.training_images(50, seed=4)), found[0][0])
    shares = [torch.cat(list(data.training_images(50, 3, Processes(rank, 3)))) for rank in range(3)]
    assert all(torch.equal(share, every[rank:50:3]) for rank, share in enumerate(shares))
    with pytest.raises(DataError, match=r"2 images cannot be shared by 3 processes; lower --trainer\.devices, or use"):
        next(data.training_images(2, 3, Processes(0, 3)))
    held_out = data.sources["val"][range(144)][0] / 255
    assert not any(bool((image == held_out).flatten(1).all(1).any()) for image in found[0][0])


def test_evaluation_sees_every_image_once_over_all_processes() -> None:
    for size, world_size in ((31, 2), (7, 3), (2, 4)):
        seen = [
            number
            for rank in range(world_size)
            for batch in BatchSampler(size, 4, training=False, rank=rank, world_size=world_size)
            for number in batch
        ]
        assert sorted(seen) == list(range(size))


def test_training_shuffles_by_seed_and_epoch_in_equal_shares() -> None:
    def epoch(number: int, rank: int = 0, world_size: int = 1) -> list[list[int]]:
        batches = BatchSampler(50, 8 // world_size, training=True, seed=5, rank=rank, world_size=world_size)
        batches.epoch_of = lambda: number
        assert len(list(batches)) == len(batches)
        return list(batches)

    assert epoch(0) == epoch(0)
    assert epoch(0) != epoch(1)
    assert [len(batch) for batch in epoch(0)] == [8] * 6
    shares = [epoch(2, rank, 2) for rank in range(2)]
    assert [sorted(a + b) for a, b in zip(*shares, strict=True)] == [sorted(batch) for batch in epoch(2)]


def test_the_usual_augmentation_is_that_of_the_dataset() -> None:
    usual: dict[str, Any] = {"pad_crop": None, "flip": None}
    assert CIFAR10DataModule(**usual).augmentation == Augmentation(pad_crop=4, flip=True)
    assert CIFAR10DataModule(pad_crop=None, flip=False).augmentation == Augmentation(pad_crop=4)
    assert STL10DataModule(**usual, mixup=0.2).augmentation == Augmentation(pad_crop=12, flip=True, mixup=0.2)
    # Mirrored digits are other signs, and nobody knows what a folder of images shows.
    assert DigitsDataModule(**usual).augmentation == Augmentation()
    assert FolderDataModule(root="images", **usual).augmentation == Augmentation()
    assert CIFAR10DataModule().augmentation == Augmentation()


def test_pad_crop_flip_equals_a_loop_over_images() -> None:
    images = torch.randint(1, 255, (20, 3, 6, 5), dtype=torch.uint8)
    out = pad_crop_flip(images, 2, True, Draws(1))
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2))
    kinds = set()
    for before, after in zip(padded, out, strict=True):
        windows = {
            (top, left, flipped): torch.equal(
                after,
                before[:, top : top + 6, left : left + 5].flip(2)
                if flipped
                else before[:, top : top + 6, left : left + 5],
            )
            for top in range(5)
            for left in range(5)
            for flipped in (False, True)
        }
        found = [key for key, equal in windows.items() if equal]
        assert len(found) == 1
        kinds.add(found[0][2])
    assert kinds == {False, True}


def test_noise_is_uniform_in_normalized_pixels() -> None:
    data = DigitsDataModule(train_on="noise", noise_range=2.0, batch_size=500, steps_per_epoch=3)
    data.setup("fit")
    assert len(data.train_dataloader()) == 3
    assert "train" not in data.sources

    class ResizeCenterCrop:
        training, world_size, global_rank = True, 1, 0

        class fit_loop:  # noqa: N801
            total_batch_idx = 0

        class strategy:  # noqa: N801
            root_device = torch.device("cpu")

    data.trainer = ResizeCenterCrop()  # type: ignore[assignment]
    images, _ = data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)
    unit = (images - 0.3) / 0.38
    assert images.shape == (500, 1, 8, 8)
    assert float(unit.abs().max()) == pytest.approx(2, abs=0.01)
    assert float(unit.var()) == pytest.approx(4**2 / 12, rel=0.05)


def test_cifar10_is_read_as_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_hashes(monkeypatch)
    data = CIFAR10DataModule(root=str(write_cifar10(tmp_path)))
    data.setup("fit")
    data.setup("test")
    assert {name: len(source) for name, source in data.sources.items()} == {"train": 45, "val": 5, "test": 10}
    assert data.num_classes == 10
    assert sorted(_all_labels(data.test_dataloader()[0])) == list(range(10))


def test_cifar100_is_read_from_image_files(tmp_path: Path) -> None:
    data = CIFAR100DataModule(root=str(write_image_folder(tmp_path, 100, 1, names=CIFAR100_CLASSES)))
    data.setup("fit")
    data.setup("test")
    assert data.num_classes == 100
    assert data.sources["train"][[0]][0].shape == (1, 3, 32, 32)
    assert _all_labels(data.test_dataloader()[0]) == list(range(100))
    with pytest.raises(DataError, match="train/apple is no class of this dataset"):
        CIFAR10DataModule(root=str(tmp_path)).setup("fit")


def test_missing_cifar_says_what_to_put_where(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        CIFAR10DataModule(root=str(tmp_path)).setup("fit")
    message = str(caught.value)
    assert f"no complete CIFAR10 under {tmp_path}" in message
    assert "cifar-10-python.tar.gz unpacked there" in message
    assert "--data.download=true" in message


@pytest.mark.parametrize(
    ("splits", "counts"),
    [
        (("train", "test"), {"train": 27, "val": 3, "test": 30}),
        (("train", "val"), {"train": 27, "val": 3, "test": 30}),
        (("train", "val", "test"), {"train": 30, "val": 30, "test": 30}),
    ],
)
def test_folders_use_the_splits_that_are_there(tmp_path: Path, splits: tuple[str, ...], counts: dict[str, int]) -> None:
    data = FolderDataModule(root=str(write_image_folder(tmp_path, 3, 10, splits)))
    data.setup("fit")
    data.setup("test")
    assert {name: len(source) for name, source in data.sources.items()} == counts
    assert data.classes == ("class000", "class001", "class002")


def test_folder_images_carry_their_own_label_and_are_fitted_to_size(tmp_path: Path) -> None:
    write_image_folder(tmp_path, 2, 3)
    Image.fromarray(np.full((40, 60, 3), 200, dtype=np.uint8)).save(tmp_path / "test" / "class001" / "0.png")
    data = FolderDataModule(root=str(tmp_path), image_size=16)
    data.setup("test")
    images, labels = data.sources["test"][[3, 0]]
    assert images.shape == (2, 3, 16, 16)
    assert labels.tolist() == [1, 0]
    assert (images[0] == 200).all()
    with pytest.raises(DataError, match=r"0\.png is 60x40 pixels, other images are 32x32; pass --data.image_size"):
        FolderDataModule(root=str(tmp_path)).setup("test")


def test_wrong_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has none of train/, val/, test/; expected .*--data.root"):
        FolderDataModule(root=str(tmp_path)).setup("fit")
    write_image_folder(tmp_path, 2, 1)
    (tmp_path / "test" / "stranger").mkdir()
    with pytest.raises(DataError, match=r"test has 3 class folders, .*train has 2; they differ in stranger"):
        FolderDataModule(root=str(tmp_path)).setup("test")
    (tmp_path / "test" / "stranger").rmdir()
    (tmp_path / "test" / "class000" / "0.png").write_bytes(b"not an image")
    with pytest.raises(DataError, match=r"0\.png is not a readable image"):
        FolderDataModule(root=str(tmp_path)).setup("test")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size=0; expected at least 1"),
        ({"eval_batch_size": -1}, "eval_batch_size=-1; expected at least 1"),
        ({"steps_per_epoch": 0}, "steps_per_epoch=0; expected at least 1"),
        ({"split_seed": -1}, "split_seed=-1; expected at least 0"),
        ({"pad_crop": -1}, "pad_crop=-1; expected at least 0"),
        ({"num_workers": -1}, "num_workers=-1; expected at least 0"),
        ({"val_share": 1.5}, r"val_share=1\.5; expected a share"),
        ({"val_share": -0.1}, r"val_share=-0\.1; expected a share"),
        ({"val_share": float("nan")}, "val_share=nan; expected a share"),
        ({"noise_range": -2.0}, r"noise_range=-2\.0; expected a finite number above 0"),
        ({"noise_range": float("inf")}, "noise_range=inf; expected a finite number above 0"),
        ({"noise_range": float("nan")}, "noise_range=nan; expected a finite number above 0"),
        ({"mixup": -0.1}, r"mixup=-0\.1; expected the largest share"),
        ({"resized_crop": -1.0}, r"resized_crop=-1\.0; expected a share"),
        ({"resized_crop": 2.0}, r"resized_crop=2\.0; expected a share"),
        ({"train_on": "labels"}, "train_on='labels'; expected one of images, noise, none"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        DigitsDataModule(**options)


def test_wrong_options_of_folders_and_test_sets_are_refused() -> None:
    for size in (0, -32):
        with pytest.raises(UsageError, match=f"image_size={size}; expected at least 1"):
            FolderDataModule("data", image_size=size)
    with pytest.raises(UsageError, match="seed=-1; expected at least 0"):
        Corrupted(seed=-1)
    with pytest.raises(UsageError, match="Corrupted was given an empty list; expected corruptions out of"):
        Corrupted([])


def test_a_split_seed_of_any_size_is_a_seed() -> None:
    data = DigitsDataModule(split_seed=2**70)
    data.setup("validate")
    assert len(data.sources["val"]) == 144


def test_selection_on_test_as_in_the_paper_validates_on_the_test_images_and_warns() -> None:
    data = DigitsDataModule(select_on_test_as_the_paper_did=True)
    for stage in ("fit", "test"):
        with pytest.warns(UserWarning, match="select_on_test_as_the_paper_did: true: .* are biased upwards"):
            data.setup(stage)
    assert {name: len(source) for name, source in data.sources.items()} == {"train": 1437, "val": 360, "test": 360}
    assert torch.equal(data.sources["val"].labels, data.sources["test"].labels)


def test_a_single_training_image_is_trained_on_where_another_folder_validates(tmp_path: Path) -> None:
    write_image_folder(tmp_path, 1, 1, ("train", "val", "test"))
    data = FolderDataModule(str(tmp_path))
    data.setup("fit")
    (batch,) = data.train_dataloader()
    assert batch[0].shape == (1, 3, 32, 32)
    assert len(list(data.val_dataloader())) == 1


def test_a_single_training_image_cannot_be_trained_on_and_held_out(tmp_path: Path) -> None:
    write_image_folder(tmp_path, 1, 1)
    with pytest.raises(DataError, match=r"1 training images, of which val_share=0\.1 holds out 1 for validation: none"):
        FolderDataModule(str(tmp_path)).setup("fit")
    data = FolderDataModule(str(tmp_path), train_on="none")  # it validates only
    data.setup("fit")
    assert len(data.sources["val"]) == 1
    with pytest.raises(DataError, match=r"of which val_share=0\.9 holds out 3 for validation"):
        FolderDataModule(str(write_image_folder(tmp_path / "few", 1, 3)), val_share=0.9).setup("fit")


def test_images_of_another_size_in_a_later_batch_are_named(tmp_path: Path) -> None:
    folder = write_image_folder(tmp_path, 1, 251) / "test" / "class000"
    Image.new("RGB", (40, 32)).save(folder / "99.png")  # the last one
    with pytest.raises(DataError, match=r"99\.png is 40x32 pixels, other images are 32x32; pass --data\.image_size"):
        FolderDataModule(str(tmp_path)).setup("test")


def test_fewer_training_images_than_processes_are_refused() -> None:
    with pytest.raises(DataError, match="3 training images cannot be shared by 4 processes"):
        BatchSampler(3, 1, training=True, world_size=4)


def test_an_image_that_a_worker_process_cannot_read_is_named_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nernlit.data.base._IN_MEMORY_BYTES", 0)
    write_image_folder(tmp_path, 10, 1)
    (tmp_path / "test" / "class003" / "0.png").write_bytes(b"damaged")
    data = FolderDataModule(str(tmp_path), num_workers=1)
    module = ReconOnly(tiny_representation(), optimizer=torch.optim.Adam)
    with pytest.raises(DataError, match=r"class003/0\.png is not a readable image") as caught:
        quiet_trainer().test(module, data, verbose=False)
    assert "\n" not in str(caught.value)


def test_predicting_reads_no_data(tmp_path: Path) -> None:
    module = ReconOnly(tiny_representation(), optimizer=torch.optim.Adam)
    ((name, state),) = quiet_trainer().predict(module, CIFAR10DataModule(str(tmp_path)))  # type: ignore[misc]
    assert name == "TinyCNN"
    assert state.keys() == module.representation.original.net.state_dict().keys()  # type: ignore[attr-defined]


def test_labels_of_stl10_out_of_range_are_refused(tmp_path: Path) -> None:
    root = write_stl10(tmp_path, each=4)
    labels = root / "stl10_binary" / "test_y.bin"
    for content, message in (
        (bytes([1, 2, 0, 3]), "4 labels from 0 to 3; expected 27,648 bytes per label and labels from 1 to 10"),
        (bytes([1, 2, 3, 11]), "4 labels from 1 to 11; expected"),
        (bytes([1, 2, 3]), "110,592 bytes and test_y.bin 3 labels from 1 to 3"),
        (b"", "0 labels; expected"),
        (b"<html>", "6 labels from 60 to"),
    ):
        labels.write_bytes(content)
        with pytest.raises(DataError, match=message):
            STL10DataModule(str(root)).setup("test")
    labels.unlink()
    with pytest.raises(DataError, match=r"cannot read .*test_y.bin \(No such file or directory\)\. Put the published"):
        STL10DataModule(str(root)).setup("test")


@pytest.mark.parametrize("kind", [CIFAR10DataModule, STL10DataModule])
def test_a_download_that_fails_says_where_to_put_the_files(
    kind: type[ImageDataModule], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*_: object, **__: object) -> None:
        raise http.client.IncompleteRead(b"")

    for name in ("cifar", "stl10"):
        monkeypatch.setattr(f"torchvision.datasets.{name}.download_and_extract_archive", offline)
    with pytest.raises(DataError, match=rf"{tmp_path} .*IncompleteRead.*Put the published .*unpacked there"):
        kind(str(tmp_path), download=True).prepare_data()


@pytest.mark.parametrize("size", [(61, 40), (40, 61), (300, 200), (32, 32), (33, 47)])
@pytest.mark.parametrize("name", ["resnet18.tv_in1k", "resnet18.a1_in1k", "cifar_resnet20"])
def test_images_are_fitted_as_timm_fits_them(size: tuple[int, int], name: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    config = timm.get_pretrained_cfg(name)
    theirs = timm.data.create_transform(
        config.input_size, interpolation=config.interpolation, crop_pct=config.crop_pct, normalize=False
    )
    expected = np.asarray(theirs(image)).transpose(1, 2, 0)
    assert np.array_equal(np.asarray(ResizeCenterCrop.from_model(name)(image)), expected)


def test_imagenet_is_read_by_its_wordnet_ids(tmp_path: Path) -> None:
    names = timm.data.ImageNetInfo().label_names()
    write_image_folder(tmp_path, classes=1000, each=1, splits=("train", "val"), names=names)
    data = ImageNetDataModule(str(tmp_path), model="cifar_resnet20", val_share=0.1, batch_size=8)
    data.setup("fit")
    data.setup("test")
    assert [len(data.sources[split]) for split in ("train", "val", "test")] == [900, 100, 1000]
    assert data.num_classes == 1000
    assert data.classes == tuple(sorted(names))
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "ILSVRC2012_test_00000001.JPEG").touch()  # published without labels
    data.check()
    (tmp_path / "val" / names[7]).rename(tmp_path / "val" / "cat")
    with pytest.raises(DataError, match=r"val has 1000 class folders, 999 of them ImageNet's 1,000; .*ILSVRC2012"):
        data.setup("test")


def test_a_resized_crop_is_a_part_of_the_image_and_the_same_for_the_same_state() -> None:
    ramp = torch.arange(64.0).expand(5, 1, 64, 64)
    first, again = (resized_crop(ramp, 0.08, Draws(3)) for _ in range(2))
    assert torch.equal(first, again)
    steps = first.diff(dim=3)[..., 2:-2]
    for image in steps:  # stretched evenly: the ramp stays a ramp, and is less steep
        assert torch.allclose(image, image.mean().expand_as(image), atol=1e-3)
        assert 0.08**0.5 * (3 / 4) ** 0.5 - 1e-3 < float(image.mean()) <= 1
    assert not torch.equal(first[0], first[1])
    whole = resized_crop(ramp, 1.0, Draws(3))
    assert float((whole - ramp).abs().mean()) < 9  # the sides' ratio still varies


def test_statistics_are_those_of_the_network_in_use() -> None:
    data = ImageNetDataModule("nowhere")
    data.classes = ("a", "b")
    for channels in (1, 3, 4, 3):
        data._adopt_network(type("Network", (), {"num_classes": data.num_classes, "in_chans": channels}))
        assert len(data.mean) == channels
    assert data.mean == ImageNetDataModule.mean
