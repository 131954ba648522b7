"""Augmentation of whole batches, on whatever device they are."""

import torch
from torch import Tensor
from torch.nn import functional


def pad_crop_flip(images_BCHW: Tensor, pad: int, flip: bool, generator: torch.Generator) -> Tensor:
    """Zero-pad, cut out a random window of the old size for each image, and mirror each with probability 1/2.

    Args:
        images_BCHW: Any dtype.
        pad: Pixels added on every side; 0 leaves positions alone.
        flip: Whether to mirror left and right.
        generator: On the CPU; the same state gives the same result on every device.

    >>> images = torch.arange(4.0).view(1, 1, 2, 2)
    >>> bool((pad_crop_flip(images, 0, False, torch.Generator()) == images).all())
    True
    """
    batch, _, height, width = images_BCHW.shape
    device = images_BCHW.device
    top = torch.randint(2 * pad + 1, (batch, 1), generator=generator)
    left = torch.randint(2 * pad + 1, (batch, 1), generator=generator)
    mirrored = torch.rand(batch, 1, generator=generator) < (0.5 if flip else 0.0)
    rows_BH = (top + torch.arange(height)).to(device)
    columns_BW = (left + torch.where(mirrored, torch.arange(width).flip(0), torch.arange(width))).to(device)
    padded = functional.pad(images_BCHW, (pad, pad, pad, pad))
    which = torch.arange(batch, device=device)[:, None, None]
    # Two index tensors around a full slice put their dimensions first: (B, H, W, C).
    return padded[which, :, rows_BH[:, :, None], columns_BW[:, None, :]].permute(0, 3, 1, 2).contiguous()
