"""Augmentation of whole batches, on the device of the images.

The numbers drawn for an image depend on the seed and on its place in the joint batch of all processes. So W processes
with batches of B images augment like one process with batches of W * B (with mixup: if B is even).
"""

import math
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor
from torch.nn import functional

from nernlit.errors import UsageError, require_at_least


@final
class Draws:
    """Random numbers for the images of one process's share of a joint batch.

    The numbers of the joint batch are drawn on the CPU and sliced, so they are the same on every device and for every
    number of processes. Process r has images r * B to (r + 1) * B - 1.

    Args:
        seed: Seed of the joint batch, equal on all processes.
        rank: Index of this process.
        world_size: Number of processes, which have batches of the same size.

    >>> bool((Draws(5).uniform(4, 2)[2:] == Draws(5, rank=1, world_size=2).uniform(2, 2)).all())
    True
    """

    def __init__(self, seed: int, rank: int = 0, world_size: int = 1) -> None:
        self._generator = torch.Generator().manual_seed(seed % 2**63)
        self._rank, self._world_size = rank, world_size

    def uniform(self, batch: int, *shape: int) -> Tensor:
        """Numbers in [0, 1), (batch, *shape)."""
        return self._own(torch.rand(batch * self._world_size, *shape, generator=self._generator))

    def integers(self, limit: int, batch: int, *shape: int) -> Tensor:
        """Integers in [0, limit), (batch, *shape)."""
        return self._own(torch.randint(limit, (batch * self._world_size, *shape), generator=self._generator))

    def _own(self, joint: Tensor) -> Tensor:
        return joint.tensor_split(self._world_size)[self._rank]


@final
@dataclass(frozen=True)
class Augmentation:
    """The augmentation of training images; the defaults change nothing.

    Attributes:
        pad_crop: Pixels of zero padding before a random crop of the old size.
        flip: Whether to mirror each image with probability 1/2.
        resized_crop: Smallest area of a random crop, as a share of the image; the crop is resized to the image's size.
            None for no such crop.
        mixup: Largest share of another image that is blended in; 0 for none.

    Raises:
        UsageError: If a value is out of range.
    """

    pad_crop: int = 0
    flip: bool = False
    resized_crop: float | None = None
    mixup: float = 0.0

    def __post_init__(self) -> None:
        require_at_least(0, pad_crop=self.pad_crop)
        if self.resized_crop is not None and not 0 < self.resized_crop <= 1:
            raise UsageError(
                f"resized_crop={self.resized_crop}; expected a share of an image's area above 0 and up to 1."
            )
        if not 0 <= self.mixup <= 0.5:
            raise UsageError(f"mixup={self.mixup}; expected the largest share of another image, between 0 and 0.5.")

    def changing(self) -> dict[str, Any]:
        """The options in use that change an image in each epoch. `flip` is not listed: it has two results only."""
        options = {"pad_crop": self.pad_crop, "resized_crop": self.resized_crop, "mixup": self.mixup}
        return {name: value for name, value in options.items() if value}

    def __call__(self, images_BCHW: Tensor, draws: Draws) -> Tensor:
        """The augmented images as pixels in [0, 1].

        Args:
            images_BCHW: uint8.
            draws: Random numbers of this batch.
        """
        if self.pad_crop or self.flip:
            images_BCHW = pad_crop_flip(images_BCHW, self.pad_crop, self.flip, draws)
        if self.resized_crop:
            images_BCHW = resized_crop(images_BCHW, self.resized_crop, draws)
        pixels_BCHW = to_pixels(images_BCHW)
        return mix(pixels_BCHW, self.mixup, draws) if self.mixup else pixels_BCHW


def to_pixels(images_BCHW: Tensor) -> Tensor:
    """Values of 0 to 255 as pixels in [0, 1], in channels-last memory format, in which convolutions are fastest."""
    # One pass to convert and to change the format, and one in place.
    return images_BCHW.to(torch.float32, memory_format=torch.channels_last, copy=True).div_(255)


def pad_crop_flip(images_BCHW: Tensor, pad: int, flip: bool, draws: Draws) -> Tensor:
    """Zero-pad, crop a random window of the old size per image, and mirror each image with probability 1/2.

    Args:
        images_BCHW: Any dtype.
        pad: Pixels added on every side; 0 for no shift.
        flip: Whether to mirror images horizontally.
        draws: Random numbers of this batch.

    >>> images = torch.arange(4.0).view(1, 1, 2, 2)
    >>> bool((pad_crop_flip(images, 0, False, Draws(0)) == images).all())
    True
    """
    batch, _, height, width = images_BCHW.shape
    device = images_BCHW.device
    top = draws.integers(2 * pad + 1, batch, 1)
    left = draws.integers(2 * pad + 1, batch, 1)
    mirrored = draws.uniform(batch, 1) < (0.5 if flip else 0.0)
    rows_BH = (top + torch.arange(height)).to(device)
    columns_BW = (left + torch.where(mirrored, torch.arange(width).flip(0), torch.arange(width))).to(device)
    padded = functional.pad(images_BCHW, (pad, pad, pad, pad))
    which = torch.arange(batch, device=device)[:, None, None]
    # Two index tensors around a full slice put their dimensions first: (B, H, W, C), the channels-last format.
    return padded[which, :, rows_BH[:, :, None], columns_BW[:, None, :]].permute(0, 3, 1, 2)


def resized_crop(images_BCHW: Tensor, smallest: float, draws: Draws) -> Tensor:
    """Resize a random crop of each image to the old size (torchvision's RandomResizedCrop).

    Args:
        images_BCHW: Any dtype; the result is float32.
        smallest: Smallest area of a crop, as a share of the image. Its aspect ratio is between 3/4 and 4/3.
        draws: Random numbers of this batch.

    >>> resized_crop(torch.ones(2, 3, 8, 8), 0.1, Draws(0)).round(decimals=4).unique()
    tensor([1.])
    """
    batch = len(images_BCHW)
    area, ratio, right, down = draws.uniform(batch, 4).T
    area = smallest + (1 - smallest) * area
    ratio = torch.exp(math.log(4 / 3) * (2 * ratio - 1))
    width, height = (area * ratio).sqrt().clamp_max_(1), (area / ratio).sqrt().clamp_max_(1)
    theta_B23 = torch.zeros(batch, 2, 3)
    theta_B23[:, 0, 0], theta_B23[:, 1, 1] = width, height
    theta_B23[:, 0, 2], theta_B23[:, 1, 2] = (2 * right - 1) * (1 - width), (2 * down - 1) * (1 - height)
    grid = functional.affine_grid(theta_B23.to(images_BCHW.device), list(images_BCHW.shape), align_corners=False)
    return functional.grid_sample(images_BCHW.float(), grid, padding_mode="reflection", align_corners=False)


def mix(images_BCHW: Tensor, largest: float, draws: Draws) -> Tensor:
    """Blend the images of each pair into each other, with a random share up to `largest` (mixup, arXiv 1710.09412).

    Pairs are images 0 and 1, 2 and 3, ...; in a batch of odd size the last image does not change. Labels do not change:
    an image's own share is at least one half.

    Args:
        images_BCHW: Floats.
        largest: Share of the other image, 0 to 1/2.
        draws: Random numbers of this batch.

    >>> mix(torch.tensor([0.0, 1.0]).view(2, 1, 1, 1), 0.5, Draws(0)).flatten()
    tensor([0.2481, 0.6159])
    """
    batch = len(images_BCHW)
    share_B111 = largest * draws.uniform(batch, 1, 1, 1).to(images_BCHW.device)
    other_B = (torch.arange(batch) ^ 1).clamp_max(batch - 1).to(images_BCHW.device)
    return images_BCHW.lerp(images_BCHW[other_B], share_B111)
