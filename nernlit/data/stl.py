"""STL-10 (Coates et al. 2011)."""

from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from torchvision import datasets

from nernlit.data.augment import Augmentation
from nernlit.data.base import ImageDataModule, Split
from nernlit.data.sources import TensorImages
from nernlit.errors import DataError

_SIDE = 96
_IMAGE_BYTES = 3 * _SIDE**2


@final
class STL10DataModule(ImageDataModule):
    """STL-10's labeled images as published (`stl10_binary`): 5,000 for training, 8,000 for test, 96x96.

    Args:
        root: Folder that holds `stl10_binary/`.
        download: Whether to download missing files with torchvision.
        kwargs: See `ImageDataModule`.
    """

    classes = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")
    usual_augmentation = Augmentation(pad_crop=12, flip=True)

    def __init__(self, root: str = "data", download: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.root, self.download = Path(root), download

    def prepare_data(self) -> None:
        if self.download and not (self._folder / "train_X.bin").is_file():
            try:
                datasets.STL10(str(self.root), split="train", download=True)
            except Exception as error:  # a download fails in many ways
                reason = next(iter(str(error).splitlines()), type(error).__name__)
                raise DataError(
                    f"could not download STL-10 to {self.root} ({reason}). Put the published {datasets.STL10.filename} "
                    f"({datasets.STL10.url}) unpacked there, as {self._folder}/."
                ) from error

    @property
    def _folder(self) -> Path:
        return self.root / str(datasets.STL10.base_folder)

    def build(self, split: Split) -> TensorImages | None:
        if split == "val":
            return None
        # Not through torchvision, which hashes 2.6 GB of unlabeled images before it reads these.
        pixels, labels = self._read(f"{split}_X.bin"), self._read(f"{split}_y.bin")
        if len(pixels) != len(labels) * _IMAGE_BYTES or not len(labels) or labels.min() < 1 or labels.max() > 10:
            span = f" from {labels.min()} to {labels.max()}" if len(labels) else ""
            raise DataError(
                f"{self._folder}/{split}_X.bin has {len(pixels):,} bytes and {split}_y.bin {len(labels):,} labels"
                f"{span}; expected {_IMAGE_BYTES:,} bytes per label and labels from 1 to 10; "
                f"unpack {datasets.STL10.filename} again."
            )
        # The file stores images in column-major order.
        images = torch.from_numpy(pixels).view(-1, 3, _SIDE, _SIDE).transpose(2, 3).contiguous()
        return TensorImages(images, torch.from_numpy(labels).long() - 1)

    def _read(self, name: str) -> NDArray[np.uint8]:
        try:
            return np.fromfile(self._folder / name, dtype=np.uint8)
        except OSError as error:
            raise DataError(
                f"cannot read {self._folder / name} ({error.strerror}). Put the published {datasets.STL10.filename} "
                f"unpacked there; or pass --data.download=true on a machine with a network ({datasets.STL10.url})."
            ) from error
