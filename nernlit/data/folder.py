"""Any tree of image files."""

from pathlib import Path
from typing import Any, final

from nernlit.data.base import ImageDataModule, Split
from nernlit.data.sources import FileImages, folder_classes, folder_images
from nernlit.errors import DataError


@final
class FolderDataModule(ImageDataModule):
    """`<root>/train/<class>/<image>` with `test/`, `val/` or both beside it.

    With both, `val` selects and `test` reports. With one of them, that one reports and a seeded share of `train`
    selects.

    Args:
        root: Folder that holds the splits.
        image_size: Side in pixels to which images are fitted; None where all files have one size already.
        kwargs: See `ImageDataModule`.
    """

    def __init__(self, root: str, image_size: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.root, self.image_size = Path(root), image_size

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
        return folder_images(self.root / name, self.classes, self.image_size)
