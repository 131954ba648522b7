"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009)."""

from abc import ABC
from pathlib import Path
from typing import Any, final

import torch
from torchvision import datasets

from nernlit.data.augment import Augmentation
from nernlit.data.base import ImageDataModule, Split
from nernlit.data.cifar_classes import CIFAR10_CLASSES, CIFAR100_CLASSES, published_labels
from nernlit.data.decode import ResizeCenterCrop
from nernlit.data.sources import ImageSource, TensorImages
from nernlit.data.trees import class_folders, tree_images
from nernlit.errors import DataError

_SIDE = 32


class _CifarDataModule(ImageDataModule, ABC):
    """50,000 training and 10,000 test images of 32x32 pixels."""

    dataset: type[datasets.CIFAR10]
    usual_augmentation = Augmentation(pad_crop=4, flip=True)

    def __init__(self, root: str = "data", download: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.root, self.download = Path(root), download

    def prepare_data(self) -> None:
        if self.download and not self._is_tree():
            self._published_files("train", download=True)

    def check(self) -> None:
        if self._is_tree():
            for split in ("train", "test"):
                self._labels(split)

    def build(self, split: Split) -> ImageSource | None:
        if split == "val":
            return None
        if self._is_tree():
            return tree_images(self.root / split, self._labels(split), ResizeCenterCrop(_SIDE), self.channels)
        published = self._published_files(split)
        images = torch.from_numpy(published.data).permute(0, 3, 1, 2).contiguous()
        return TensorImages(images, torch.tensor(published.targets))

    def _is_tree(self) -> bool:
        return (self.root / "train").is_dir() and (self.root / "test").is_dir()

    def _labels(self, split: str) -> dict[str, int]:
        folder = self.root / split
        return published_labels(class_folders(folder), self.classes, str(folder))

    def _published_files(self, split: Split, download: bool = False) -> datasets.CIFAR10:
        # These files are pickles. torchvision opens them only if their MD5 sums are the published ones.
        try:
            return self.dataset(str(self.root), train=split == "train", download=download)
        except Exception as error:  # a download fails in many ways
            what = self.dataset
            raise DataError(
                f"no complete {what.__name__} under {self.root} ({str(error).splitlines()[0]}). Put the published "
                f"{what.filename} unpacked there, as {self.root / what.base_folder}/, or an image tree "
                f"{self.root}/{{train,test}}/<class>/<image>; or pass --data.download=true on a machine with a network "
                f"({what.url})."
            ) from error


@final
class CIFAR10DataModule(_CifarDataModule):
    """CIFAR-10 as published (`cifar-10-batches-py`), or copied to image files (`{train,test}/<class>/...`).

    Both forms have the published labels. Class folders are named by the published names, known aliases (plane, car) or
    the labels 0 to 9. If a root holds both forms, the image files are read.

    Args:
        root: Folder that holds either form.
        download: Whether to download missing files with torchvision.
        kwargs: See `ImageDataModule`.
    """

    dataset = datasets.CIFAR10
    classes = CIFAR10_CLASSES


@final
class CIFAR100DataModule(_CifarDataModule):
    """CIFAR-100 as published (`cifar-100-python`), or copied to image files (`{train,test}/<class>/...`).

    Both forms have the published (fine) labels. Class folders are named by the published names, known aliases or the
    labels 0 to 99. If a root holds both forms, the image files are read.

    Args:
        root: Folder that holds either form.
        download: Whether to download missing files with torchvision.
        kwargs: See `ImageDataModule`.
    """

    dataset = datasets.CIFAR100
    classes = CIFAR100_CLASSES
