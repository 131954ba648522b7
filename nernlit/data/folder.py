"""Any tree of image files, and ImageNet's."""

from abc import ABC
from pathlib import Path
from typing import Any, final

from timm.data import ImageNetInfo

from nernlit.data.base import ImageDataModule, Split
from nernlit.data.sources import FileImages, Fitting, folder_classes, folder_images
from nernlit.errors import DataError


class _TreeDataModule(ImageDataModule, ABC):
    """`<root>/train/<class>/<image>` with `test/`, `val/` or both beside it."""

    fitting: Fitting | None

    def __init__(self, root: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.root = Path(root)

    def setup(self, stage: str) -> None:
        folders = {name for name in ("train", "val", "test") if (self.root / name).is_dir()}
        if "train" not in folders or len(folders) < 2:
            raise DataError(
                f"{self.root} has {', '.join(sorted(folders)) or 'none'} of train/, val/, test/; "
                f"expected {self.root}/train/<class>/<image> and test/ or val/ beside it (--data.root)."
            )
        self._folders = folders
        self.classes = tuple(folder_classes(self.root / "train"))
        super().setup(stage)

    def build(self, split: Split) -> FileImages | None:
        if split == "val" and self._folders != {"train", "val", "test"}:
            return None
        name = split if split in self._folders else "val"
        return folder_images(self.root / name, self.classes, self.fitting)


@final
class FolderDataModule(_TreeDataModule):
    """`<root>/train/<class>/<image>` with `test/`, `val/` or both beside it.

    With both, `val` selects and `test` reports. With one of them, that one reports and a seeded share of `train`
    selects.

    Args:
        root: Folder that holds the splits.
        image_size: Side in pixels to which images are fitted; None where all files have one size already.
        kwargs: See `ImageDataModule`.
    """

    def __init__(self, root: str, image_size: int | None = None, **kwargs: Any) -> None:
        super().__init__(root, **kwargs)
        self.fitting = Fitting(image_size) if image_size is not None else None


@final
class ImageNetDataModule(_TreeDataModule):
    """ImageNet-1k as image folders: `<root>/train/<WordNet id>/` and `<root>/val/<WordNet id>/`.

    The published validation images report; a seeded hundredth of the training images selects.

    Args:
        root: Folder that holds both.
        model: timm's name of the original; its image size, crop and interpolation are used.
        val_share: Share of the training images that is held out for validation.
        kwargs: See `ImageDataModule`.
    """

    def __init__(self, root: str, model: str = "resnet18.tv_in1k", val_share: float = 0.01, **kwargs: Any) -> None:
        super().__init__(root, val_share=val_share, **kwargs)
        self.fitting = Fitting.of_model(model)

    def setup(self, stage: str) -> None:
        expected = sorted(ImageNetInfo().label_names())
        for split in ("train", "val"):
            folder = self.root / split
            found = folder_classes(folder) if folder.is_dir() else []
            if found != expected:
                raise DataError(
                    f"{folder} has {len(found)} class folders, {len(set(found) & set(expected))} of them ImageNet's "
                    f"1,000; expected {folder}/n01440764/*.JPEG and so on (ILSVRC2012_img_{split}.tar from "
                    "https://image-net.org, a folder a class), or use FolderDataModule for other classes."
                )
        super().setup(stage)
