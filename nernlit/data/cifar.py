"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009)."""

from pathlib import Path
from typing import Any, final

import torch
from torchvision import datasets

from nernlit.data.base import ImageDataModule, Split
from nernlit.data.sources import Fitting, ImageSource, TensorImages, folder_classes, folder_images
from nernlit.errors import DataError

_SIDE = 32


class _CifarDataModule(ImageDataModule):
    """What the two have in common: 50,000 training and 10,000 test images of 32x32."""

    dataset: type[datasets.CIFAR10]
    expected_classes: int

    def __init__(self, root: str = "data", download: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.root, self.download = Path(root), download

    def prepare_data(self) -> None:
        if self.download and not self._is_folder():
            self._published_files("train", download=True)

    def setup(self, stage: str) -> None:
        if self._is_folder():
            self.classes = tuple(folder_classes(self.root / "train"))
            if len(self.classes) != self.expected_classes:
                raise DataError(
                    f"{self.root}/train has {len(self.classes)} class folders, "
                    f"{self.dataset.__name__} has {self.expected_classes}; check --data.root."
                )
        else:
            self.classes = tuple(self._published_files("train").classes)
        super().setup(stage)

    def build(self, split: Split) -> ImageSource | None:
        if split == "val":
            return None
        if self._is_folder():
            return folder_images(self.root / split, self.classes, Fitting(_SIDE))
        published = self._published_files(split)
        images = torch.from_numpy(published.data).permute(0, 3, 1, 2).contiguous()
        return TensorImages(images, torch.tensor(published.targets))

    def _is_folder(self) -> bool:
        return (self.root / "train").is_dir() and (self.root / "test").is_dir()

    def _published_files(self, split: Split, download: bool = False) -> datasets.CIFAR10:
        try:
            return self.dataset(str(self.root), train=split == "train", download=download)
        except (RuntimeError, OSError) as error:
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

    Args:
        root: Folder that holds either.
        download: Fetch it through torchvision where it is missing.
        kwargs: See `ImageDataModule`.
    """

    dataset = datasets.CIFAR10
    expected_classes = 10


@final
class CIFAR100DataModule(_CifarDataModule):
    """CIFAR-100 as published (`cifar-100-python`), or copied to image files (`{train,test}/<class>/...`).

    Args:
        root: Folder that holds either.
        download: Fetch it through torchvision where it is missing.
        kwargs: See `ImageDataModule`.
    """

    dataset = datasets.CIFAR100
    expected_classes = 100
