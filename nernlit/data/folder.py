"""Any tree of image files, and ImageNet's."""

from abc import ABC
from pathlib import Path
from typing import Any, final

from lightning.pytorch.utilities import rank_zero_info
from timm.data import ImageNetInfo

from nernlit.data.augment import Augmentation
from nernlit.data.base import ImageDataModule, Split
from nernlit.data.decode import ResizeCenterCrop
from nernlit.data.sources import FileImages
from nernlit.data.trees import class_folders, shared_classes, tree_images
from nernlit.errors import DataError, require_at_least


class _TreeDataModule(ImageDataModule, ABC):
    """`<root>/train/<class>/<image>` with `test/`, `val/` or both beside it."""

    fitting: ResizeCenterCrop | None

    def __init__(self, root: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.root = Path(root)

    #: Folders that are read where they exist.
    names: tuple[str, ...] = ("train", "val", "test")

    def check(self) -> None:
        folders = [name for name in self.names if (self.root / name).is_dir()]
        if "train" not in folders or len(folders) < 2:
            raise DataError(
                f"{self.root} has {', '.join(folders) or 'none'} of train/, val/, test/; "
                f"expected {self.root}/train/<class>/<image> and test/ or val/ beside it (--data.root)."
            )
        self._folders = folders
        self.classes = tuple(shared_classes([self.root / name for name in folders]))

    def build(self, split: Split) -> FileImages | None:
        if split == "val" and len(self._folders) < 3:
            return None
        name = split if split in self._folders else "val"
        labels = {name: label for label, name in enumerate(self.classes)}
        return tree_images(self.root / name, labels, self.fitting, self.channels, empty_classes=split != "train")


@final
class FolderDataModule(_TreeDataModule):
    """`<root>/train/<class>/<image>` with `test/`, `val/` or both beside it.

    With both, checkpoints are selected on `val` and `test` is the test set. With one of them, it is the test set, and a
    seeded share of `train` is used for validation. Labels number the class folders in the order of their sorted names,
    which the first set-up prints.

    Args:
        root: Folder that holds the splits.
        image_size: Side in pixels to which images are fitted; None where all files have one size already.
        kwargs: See `ImageDataModule`.
    """

    def __init__(self, root: str, image_size: int | None = None, **kwargs: Any) -> None:
        super().__init__(root, **kwargs)
        if image_size is not None:
            require_at_least(1, image_size=image_size)
        self.fitting = ResizeCenterCrop(image_size) if image_size is not None else None

    def check(self) -> None:
        before = self.classes
        super().check()
        if self.classes != before:
            numbered = [f"{label} {name}" for label, name in enumerate(self.classes)]
            shown = numbered if len(numbered) <= 20 else [*numbered[:5], "...", numbered[-1]]
            rank_zero_info(f"{self.root}: {len(numbered)} classes, in the order of their labels: {', '.join(shown)}")


@final
class ImageNetDataModule(_TreeDataModule):
    """ImageNet-1k as image folders: `<root>/train/<WordNet id>/` and `<root>/val/<WordNet id>/`.

    The published validation images are the test set; a seeded hundredth of the training images is used for validation.

    Args:
        root: Folder that holds both.
        model: timm's name of the original; its image size, crop and interpolation are used.
        val_share: Share of the training images that is held out for validation.
        kwargs: See `ImageDataModule`.
    """

    usual_augmentation = Augmentation(flip=True)
    names = ("train", "val")  # the published test images have no labels

    def __init__(self, root: str, model: str = "resnet18.tv_in1k", val_share: float = 0.01, **kwargs: Any) -> None:
        super().__init__(root, val_share=val_share, **kwargs)
        self.fitting = ResizeCenterCrop.from_model(model)

    def check(self) -> None:
        expected = sorted(ImageNetInfo().label_names())
        for split in ("train", "val"):
            folder = self.root / split
            found = class_folders(folder) if folder.is_dir() else []
            if found != expected:
                raise DataError(
                    f"{folder} has {len(found)} class folders, {len(set(found) & set(expected))} of them ImageNet's "
                    f"1,000; expected {folder}/n01440764/*.JPEG and so on (ILSVRC2012_img_{split}.tar from "
                    "https://image-net.org, a folder per class), or use FolderDataModule for other classes."
                )
        super().check()
