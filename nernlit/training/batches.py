"""Batches of a datamodule, which may be a user's own: (images, labels), perhaps with the numbers of the images.

Images are pixels (B, C, H, W) in [0, 1], labels are classes (B,).
"""

from typing import Any

import torch
from torch import Tensor

from nernlit.errors import DataError

_EXPECTED = "expected (images, labels): float32 pixels (B, C, H, W) in [0, 1], and integers (B,)"


def images_of(batch: Any) -> Tensor:
    """The images (B, C, H, W) of a batch.

    Raises:
        DataError: If it is no batch of images and labels.
    """
    if not isinstance(batch, tuple | list):
        raise DataError(f"a batch is a {type(batch).__name__}; {_EXPECTED}.")
    if len(batch) not in (2, 3) or not all(isinstance(part, Tensor) for part in batch):
        kinds = ", ".join(type(part).__name__ for part in batch)
        raise DataError(f"a batch consists of ({kinds}); {_EXPECTED}.")
    images_BCHW: Tensor = batch[0]
    if not images_BCHW.is_floating_point() or images_BCHW.dim() != 4:
        kind = str(images_BCHW.dtype).removeprefix("torch.")
        raise DataError(f"the images of a batch are {kind} of shape {tuple(images_BCHW.shape)}; {_EXPECTED}.")
    return images_BCHW


def labels_of(batch: Any, num_classes: int) -> Tensor:
    """The labels (B,) of a batch, as int64.

    Raises:
        DataError: If they are not integers (B,), or (checked on the CPU only) not from 0 to `num_classes` - 1.
    """
    images_BCHW = images_of(batch)
    labels_B: Tensor = batch[1]
    is_integer = not (labels_B.is_floating_point() or labels_B.is_complex() or labels_B.dtype == torch.bool)
    if not is_integer or labels_B.shape != (len(images_BCHW),):
        kind = str(labels_B.dtype).removeprefix("torch.")
        raise DataError(f"the labels of a batch are {kind} of shape {tuple(labels_B.shape)}; {_EXPECTED}.")
    # Elsewhere each check would make the step wait for the device.
    if labels_B.device.type == "cpu" and bool(((labels_B < 0) | (labels_B >= num_classes)).any()):
        lowest, highest = int(labels_B.min()), int(labels_B.max())
        raise DataError(f"labels are from {lowest} to {highest}; expected 0 to {num_classes - 1}.")
    return labels_B.long()
