"""Where images come from: tensors in memory, or files that are decoded when asked for.

A source is indexed with a *list* of numbers and gives a whole batch, uint8 pixels (B, C, H, W) and labels (B,), so
that a loader makes one call a batch. `subset` narrows it, `in_memory` decodes it once.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self, final

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from rich.progress import track
from torch import Tensor
from torch.utils.data import Dataset

from nernlit.errors import DataError, UsageError

Interpolation = Literal["bilinear", "bicubic"]

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff")


class ImageSource(Dataset[tuple[Tensor, Tensor]], ABC):
    """Labelled images, read by the batch."""

    labels: Tensor

    @abstractmethod
    def __getitem__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Pixels (B, C, H, W) uint8 and labels (B,) int64 of the numbered images."""

    @abstractmethod
    def subset(self, indices: Tensor) -> Self:
        """The images of these numbers only, none of them decoded yet."""

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
    """Images in a numpy array (N, H, W, C), which may be mapped from a file: only what is asked for is read."""

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
@dataclass(frozen=True)
class Fitting:
    """How an image of any size becomes a square: resized, then its centre cut out, as torchvision and timm do it.

    Attributes:
        side: Of the square, in pixels.
        crop_share: What the square is of the shorter side after resizing.
        interpolation: Of the resizing.
    """

    side: int
    crop_share: float = 1.0
    interpolation: Interpolation = "bicubic"

    @classmethod
    def of_model(cls, name: str) -> Self:
        """What a timm model was trained or evaluated with.

        Raises:
            UsageError: If timm does not know the model.
        """
        config = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
        if config is None:
            raise UsageError(f"timm has no model named {name!r} whose image size it knows.")
        interpolation: Interpolation = "bilinear" if config.interpolation == "bilinear" else "bicubic"
        return cls(config.input_size[1], config.crop_pct, interpolation)

    def __call__(self, image: Image.Image) -> Image.Image:
        """The square."""
        shorter = int(self.side / self.crop_share)
        if image.size != (self.side, self.side) or shorter != self.side:
            longer = int(shorter * max(image.size) / min(image.size))
            size = (shorter, longer) if image.width <= image.height else (longer, shorter)
            image = image.resize(size, getattr(Image.Resampling, self.interpolation.upper()))
            left, top = (round((extent - self.side) / 2) for extent in image.size)
            image = image.crop((left, top, left + self.side, top + self.side))
        return image


@final
class FileImages(ImageSource):
    """Image files, decoded to RGB by threads.

    Args:
        paths: The files.
        labels: (N,) integers.
        fitting: To one size; None keeps the files' own.
    """

    def __init__(self, paths: Sequence[Path], labels: Tensor, fitting: Fitting | None) -> None:
        self.paths, self.labels, self.fitting = list(paths), labels.long(), fitting

    def __getitem__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        with ThreadPoolExecutor(max_workers=4) as pool:
            images = list(pool.map(self._decode, indices))
        return self._stack(images, indices), self.labels[torch.as_tensor(indices)]

    def subset(self, indices: Tensor) -> Self:
        return type(self)([self.paths[i] for i in indices], self.labels[indices], self.fitting)

    def in_memory(self) -> TensorImages:
        numbers = list(range(len(self)))
        parts = [numbers[i : i + 1000] for i in range(0, len(numbers), 1000)]
        shown = track(parts, description=f"decoding {len(self):,} images", transient=True, disable=len(parts) < 5)
        return TensorImages(torch.cat([self[part][0] for part in shown]), self.labels)

    def _decode(self, index: int) -> Tensor:
        path = self.paths[index]
        try:
            with Image.open(path) as opened:
                image = opened.convert("RGB")
        except (UnidentifiedImageError, OSError) as error:
            raise DataError(f"{path} is not a readable image ({error}); replace or remove the file.") from error
        if self.fitting is not None:
            image = self.fitting(image)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)

    def _stack(self, images: list[Tensor], indices: Sequence[int]) -> Tensor:
        for image, index in zip(images, indices, strict=True):
            if image.shape != images[0].shape:
                raise DataError(
                    f"{self.paths[index]} is {image.shape[2]}x{image.shape[1]} pixels, other images are "
                    f"{images[0].shape[2]}x{images[0].shape[1]}; pass --data.image_size to bring all to one size."
                )
        return torch.stack(images)


def folder_classes(folder: Path) -> list[str]:
    """The class names of an ImageFolder tree: its sub-folders, sorted.

    Raises:
        DataError: If there are none.
    """
    classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir()) if folder.is_dir() else []
    if not classes:
        raise DataError(f"{folder} has no class folders; expected {folder}/<class>/<image> with one folder a class.")
    return classes


def folder_images(folder: Path, classes: Sequence[str], fitting: Fitting | None) -> FileImages:
    """The images of an ImageFolder tree, labelled by their class's place in `classes`.

    Raises:
        DataError: If the folder's classes are others, or it holds no image.
    """
    found = folder_classes(folder)
    if found != list(classes):
        odd = sorted(set(found) ^ set(classes))
        raise DataError(
            f"{folder} has {len(found)} classes, expected the {len(classes)} of its sibling; "
            f"they differ in {', '.join(odd[:5])}. Every split needs the same class folders."
        )
    files = [
        (path, label)
        for label, name in enumerate(classes)
        for path in sorted((folder / name).rglob("*"))
        if path.suffix.lower() in IMAGE_SUFFIXES
    ]
    if not files:
        raise DataError(f"{folder} holds no image files ({', '.join(IMAGE_SUFFIXES)}).")
    return FileImages([path for path, _ in files], torch.tensor([label for _, label in files]), fitting)
