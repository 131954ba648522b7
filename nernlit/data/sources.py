"""Sources of images: tensors in memory, or files that are decoded on access.

A source is indexed with a *list* of indices and returns a whole batch, uint8 pixels (B, C, H, W) and labels (B,), so
that a loader makes one call per batch. `subset` selects images, `in_memory` decodes all of them.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Self, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from nernlit.data.channels import require_channels, to_channels
from nernlit.data.decode import ResizeCenterCrop, read_image
from nernlit.data.file_paths import FilePaths
from nernlit.errors import DataError
from nernlit.utilities.progress import progress


class ImageSource(Dataset[tuple[Tensor, Tensor]], ABC):
    """Labeled images, read in batches."""

    labels: Tensor

    @abstractmethod
    def __getitem__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Pixels (B, C, H, W) uint8 and labels (B,) int64 of the images with these indices."""

    @abstractmethod
    def subset(self, indices: Tensor) -> Self:
        """The images with these indices, not decoded yet."""

    @abstractmethod
    def in_memory(self) -> "TensorImages":
        """The same images, decoded."""

    def __len__(self) -> int:
        return len(self.labels)


@final
class TensorImages(ImageSource):
    """Images held as one uint8 tensor (N, C, H, W)."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        if images.dtype != torch.uint8 or images.ndim != 4 or len(images) != len(labels):
            raise DataError(
                f"images {images.dtype} {tuple(images.shape)} with {len(labels)} labels; "
                "expected uint8 of shape (N, C, H, W) and N labels."
            )
        self.images, self.labels = images, labels.long()

    def __getitem__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        rows = torch.as_tensor(indices)
        return self.images[rows], self.labels[rows]

    def subset(self, indices: Tensor) -> Self:
        return type(self)(self.images[indices], self.labels[indices])

    def in_memory(self) -> "TensorImages":
        return self


@final
class ArrayImages(ImageSource):
    """Images in a numpy array (N, H, W, C), which may be memory-mapped: only indexed images are read."""

    def __init__(self, images_NHWC: NDArray[np.uint8], labels: Tensor) -> None:
        self.images, self.labels = images_NHWC, labels.long()

    def __getitem__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        rows = np.asarray(indices)
        return torch.from_numpy(np.take(self.images, rows, axis=0)).permute(0, 3, 1, 2), self.labels[
            torch.from_numpy(rows)
        ]

    def subset(self, indices: Tensor) -> Self:
        return type(self)(self.images[indices.numpy()], self.labels[indices])

    def in_memory(self) -> TensorImages:
        return TensorImages(torch.from_numpy(np.array(self.images)).permute(0, 3, 1, 2).contiguous(), self.labels)


@final
class FileImages(ImageSource):
    """Image files, decoded in threads on access.

    Args:
        paths: The files.
        labels: (N,) integers.
        fitting: Resizes and crops each image to one size; None keeps the files' own sizes.
        channels: 1, 3 or 4; RGB by default.
    """

    def __init__(
        self, paths: FilePaths, labels: Tensor, fitting: ResizeCenterCrop | None, channels: int | None = None
    ) -> None:
        self.paths, self.labels, self.fitting, self.channels = paths, labels.long(), fitting, channels or 3
        require_channels(self.channels)

    def __getitem__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        if get_worker_info() is None:
            with ThreadPoolExecutor(max_workers=4) as pool:
                images = list(pool.map(self._decode, indices))
        else:  # The loader's processes share the cores already, and each new thread would keep memory of its own.
            images = [self._decode(index) for index in indices]
        return self._stack(images, indices), self.labels[torch.as_tensor(indices)]

    def subset(self, indices: Tensor) -> Self:
        return type(self)(self.paths.subset(indices), self.labels[indices], self.fitting, self.channels)

    def in_memory(self) -> TensorImages:
        images = torch.empty(len(self), *self[[0]][0].shape[1:], dtype=torch.uint8)
        with progress(f"decoding {len(self):,} images", len(self)) as advance:
            for part in torch.arange(len(self)).split(250):
                batch = self[part.tolist()][0]
                self._require_size(batch.shape[2:], images.shape[2:], int(part[0]))
                images[part] = batch
                advance(len(part))
        return TensorImages(images, self.labels)

    def _decode(self, index: int) -> Tensor:
        return torch.from_numpy(read_image(self.paths[index], self.channels, self.fitting))

    def _stack(self, images_HWC: list[Tensor], indices: Sequence[int]) -> Tensor:
        """(B, C, H, W) in channels-last memory format, as decoded: another format would cost a copy by single bytes."""
        for image_HWC, index in zip(images_HWC, indices, strict=True):
            self._require_size(image_HWC.shape[:2], images_HWC[0].shape[:2], index)
        return torch.stack(images_HWC).permute(0, 3, 1, 2)

    def _require_size(self, size: torch.Size, other: torch.Size, index: int) -> None:
        if size != other:
            raise DataError(
                f"{self.paths[index]} is {size[1]}x{size[0]} pixels, other images are "
                f"{other[1]}x{other[0]}; pass --data.image_size to bring all to one size."
            )


@final
class InChannels(ImageSource):
    """The images of another source, converted to another number of channels on access.

    Args:
        source: The images.
        channels: 1, 3 or 4.
    """

    def __init__(self, source: ImageSource, channels: int) -> None:
        self.source, self.channels, self.labels = source, channels, source.labels

    def __getitem__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        images_BCHW, labels_B = self.source[indices]
        return to_channels(images_BCHW, self.channels), labels_B

    def subset(self, indices: Tensor) -> Self:
        return type(self)(self.source.subset(indices), self.channels)

    def in_memory(self) -> TensorImages:
        return TensorImages(to_channels(self.source.in_memory().images, self.channels), self.labels)
