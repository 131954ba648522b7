"""Which classes and files of an image tree are read, and what is said of the others."""

import logging
import os
from pathlib import Path

import pytest
import torch

from nernlit.data import CIFAR10DataModule, CIFAR100DataModule, FolderDataModule, ImageDataModule
from nernlit.data.cifar_classes import CIFAR10_CLASSES, CIFAR100_CLASSES, published_labels
from nernlit.data.trees import class_folders, tree_images
from nernlit.errors import DataError
from tests.fakes import write_image_folder

ALIASES = ("Plane", "car", "BIRD", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def _labels(data: ImageDataModule) -> dict[str, int]:
    """The label of every folder of the test images."""
    data.setup("test")
    source = tree_images(
        data.root / "test", published_labels(class_folders(data.root / "test"), data.classes, ""), None
    )  # type: ignore[attr-defined]
    assert torch.equal(source.labels, data.sources["test"].labels)
    return {path.parent.name: int(label) for path, label in zip(source.paths, source.labels, strict=True)}


@pytest.mark.parametrize(
    "names", [CIFAR10_CLASSES, ALIASES, [str(label) for label in range(10)], [f"{label:02d}" for label in range(10)]]
)
def test_cifar10_folders_get_the_published_labels(names: tuple[str, ...], tmp_path: Path) -> None:
    data = CIFAR10DataModule(str(write_image_folder(tmp_path, 10, 1, names=names)))
    assert _labels(data) == {name: label for label, name in enumerate(names)}
    assert data.classes == CIFAR10_CLASSES


@pytest.mark.parametrize(
    "names",
    [
        CIFAR100_CLASSES,
        [name.replace("_", " ").title() for name in CIFAR100_CLASSES],
        [name.replace("_", "-").removesuffix("-tree") for name in CIFAR100_CLASSES],
        [str(label) for label in range(100)],
    ],
)
def test_cifar100_folders_get_the_published_labels(names: list[str], tmp_path: Path) -> None:
    data = CIFAR100DataModule(str(write_image_folder(tmp_path, 100, 1, ("train", "test"), names)))
    assert _labels(data) == {name: label for label, name in enumerate(names)}


def test_the_published_names_are_those_of_the_published_files() -> None:
    assert (len(set(CIFAR10_CLASSES)), len(set(CIFAR100_CLASSES))) == (10, 100)
    assert list(CIFAR10_CLASSES) == sorted(CIFAR10_CLASSES)
    assert list(CIFAR100_CLASSES) == sorted(CIFAR100_CLASSES)
    # From the files: labels of the first images of the test sets, and what they show.
    assert [CIFAR10_CLASSES[label] for label in (3, 8, 8, 0, 6)] == ["cat", "ship", "ship", "airplane", "frog"]
    assert [CIFAR100_CLASSES[label] for label in (49, 33, 72, 51, 71)] == [
        *("mountain", "forest", "seal", "mushroom", "sea")
    ]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ["class0", *CIFAR10_CLASSES[1:]],
            r"train/class0 is no class of this dataset, .*\(airplane, automobile, bird, ",
        ),
        (["10", *CIFAR10_CLASSES[1:]], "train/10 is no class of this dataset"),
        (["plane", *CIFAR10_CLASSES], "train has airplane and plane for the class 'airplane'; keep one folder"),
        (["3", *CIFAR10_CLASSES], "train has 3 and cat for the class 'cat'"),
        (CIFAR10_CLASSES[:8], "train has no folder for 2 of the 10 classes: ship, truck."),
        (["maple", *CIFAR10_CLASSES[1:]], "train/maple is no class of this dataset"),
    ],
)
def test_other_folders_than_cifars_are_refused(names: list[str], message: str, tmp_path: Path) -> None:
    write_image_folder(tmp_path, 10, 1, ("test",), CIFAR10_CLASSES)
    write_image_folder(tmp_path, len(names), 1, ("train",), names)
    with pytest.raises(DataError, match=message):
        CIFAR10DataModule(str(tmp_path)).setup("fit")


@pytest.mark.parametrize("kind", [CIFAR10DataModule, FolderDataModule])
def test_a_fit_refuses_test_images_of_other_classes_before_it_reads_any(kind: type, tmp_path: Path) -> None:
    write_image_folder(tmp_path, 10, 1, names=CIFAR10_CLASSES)
    (tmp_path / "test" / "cat").rename(tmp_path / "test" / "lynx")
    (tmp_path / "train" / "dog" / "0.png").write_bytes(b"damaged")
    with pytest.raises(DataError, match="lynx"):
        kind(str(tmp_path)).setup("fit")


def test_what_begins_with_a_dot_is_no_class_and_no_image(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    write_image_folder(tmp_path, 2, 3)
    for folder in (".ipynb_checkpoints", "class000/.thumbnails"):
        (tmp_path / "train" / folder).mkdir()
        (tmp_path / "train" / folder / "0.png").write_bytes(b"damaged")
    for name in (".DS_Store", "._0.png", "Thumbs.db", "desktop.ini"):
        (tmp_path / "train" / "class001" / name).write_bytes(b"clutter")
    data = FolderDataModule(str(tmp_path), val_share=0.5)
    data.setup("fit")
    assert data.classes == ("class000", "class001")
    assert [len(data.sources[split]) for split in ("train", "val")] == [3, 3]
    assert not [warning for warning in recwarn if "left out" in str(warning.message)]


def test_folders_of_folders_are_read_in_the_order_of_their_paths(tmp_path: Path) -> None:
    write_image_folder(tmp_path, 1, 2)
    (tmp_path / "train" / "class000" / "0").mkdir()
    (tmp_path / "train" / "class000" / "1.png").rename(tmp_path / "train" / "class000" / "0" / "1.png")
    paths = tree_images(tmp_path / "train", {"class000": 0}, None).paths
    assert [str(path.relative_to(tmp_path / "train" / "class000")) for path in paths] == ["0/1.png", "0.png"]


def test_files_that_are_no_images_are_counted(tmp_path: Path) -> None:
    write_image_folder(tmp_path, 2, 2)
    for name in ("a.txt", "b.TXT", "c.npy", "README", "d.eps"):
        (tmp_path / "train" / "class001" / name).touch()
    for name, suffix in (("0.png", ".JFIF"), ("1.png", ".gif")):
        (tmp_path / "train" / "class000" / name).rename((tmp_path / "train" / "class000" / name).with_suffix(suffix))
    expected = r"train: ignored files that are not images: 2 \.txt, 1 \.eps, 1 \.npy, 1 without suffix"
    with pytest.warns(UserWarning, match=expected):
        images = tree_images(tmp_path / "train", {"class000": 0, "class001": 1}, None)
    assert images.labels.tolist() == [0, 0, 1, 1]


def test_a_class_without_images_is_named(tmp_path: Path) -> None:
    write_image_folder(tmp_path, 3, 2, ("train", "val", "test"))
    data = FolderDataModule(str(tmp_path))
    for split in ("test", "train"):
        for file in (tmp_path / split / "class001").iterdir():
            file.unlink()
    with pytest.warns(UserWarning, match=r"test: no image in class001 \(1 of 3 classes\)"):
        data.setup("test")
    assert data.sources["test"].labels.tolist() == [0, 0, 2, 2]
    with pytest.raises(DataError, match=r"train: no image in class001 \(1 of 3 classes\); expected at least one"):
        data.setup("fit")
    for label in (0, 2):
        for file in (tmp_path / "val" / f"class{label:03d}").iterdir():
            file.unlink()
    for file in (tmp_path / "val" / "class001").iterdir():
        file.unlink()
    with pytest.raises(DataError, match=r"val: no image in class000, class001, class002 \(3 of 3 classes\)"):
        data.setup("fit")


def test_the_order_of_the_classes_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = FolderDataModule(str(write_image_folder(tmp_path / "few", 3, 2)))
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    logger.addHandler(caplog.handler)
    try:
        with caplog.at_level(logging.INFO):
            data.setup("fit")
            data.setup("test")
            FolderDataModule(str(write_image_folder(tmp_path / "many", 21, 1))).setup("fit")
    finally:
        logger.removeHandler(caplog.handler)
    few, many = (tmp_path / name for name in ("few", "many"))
    assert list(dict.fromkeys(caplog.messages)) == [
        f"{few}: 3 classes, in the order of their labels: 0 class000, 1 class001, 2 class002",
        f"{many}: 21 classes, in the order of their labels: 0 class000, 1 class001, 2 class002, 3 class003, "
        "4 class004, ..., 20 class020",
    ]


def test_trees_that_cannot_be_listed_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot list .*/none \(No such file or directory\); expected .*<class>"):
        class_folders(tmp_path / "none")
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"cannot list .*/file \(Not a directory\)"):
        class_folders(tmp_path / "file")
    (tmp_path / ".hidden").mkdir()
    with pytest.raises(DataError, match="has no class folders"):
        class_folders(tmp_path)
    with pytest.raises(DataError, match=r"cannot list .*/gone \(No such file or directory\)"):
        tree_images(tmp_path, {"gone": 0}, None)


def test_names_that_no_terminal_can_show_are_read(tmp_path: Path) -> None:
    write_image_folder(tmp_path, 2, 2)
    odd = os.fsencode(tmp_path / "train" / "class000") + b"/\xff\xfe\n.png"
    os.rename(tmp_path / "train" / "class000" / "0.png", odd)
    assert len(tree_images(tmp_path / "train", {"class000": 0, "class001": 1}, None)) == 4


def test_links_to_folders_are_followed_and_loops_are_not(tmp_path: Path) -> None:
    write_image_folder(tmp_path, 1, 2)
    folder = tmp_path / "train" / "class000"
    write_image_folder(tmp_path / "other", 1, 3)
    (folder / "more").symlink_to(tmp_path / "other" / "train" / "class000")
    (tmp_path / "other" / "train" / "class000" / "back").symlink_to(folder)
    (folder / "self").symlink_to(folder)
    assert len(tree_images(tmp_path / "train", {"class000": 0}, None)) == 5
