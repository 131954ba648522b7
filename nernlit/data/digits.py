"""Handwritten digits that come with scikit-learn: nothing to download."""

from typing import Any, final

import torch
from sklearn.datasets import load_digits

from nernlit.data.base import ImageDataModule, Split
from nernlit.data.sources import TensorImages

#: Number of test images, the last ones in scikit-learn's order: 360 of 1,797, a fifth.
_TEST = 360


@final
class DigitsDataModule(ImageDataModule):
    """1,797 scans of handwritten digits (UCI, Alpaydin and Kaynak 1998), gray, 8x8; the last 360 are the test set.

    Args:
        kwargs: See `ImageDataModule`.
    """

    classes = tuple("0123456789")
    mean = (0.3,)
    std = (0.38,)

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)

    def build(self, split: Split) -> TensorImages | None:
        if split == "val":
            return None
        digits = load_digits()
        images = (torch.from_numpy(digits.images) * (255 / 16)).round().to(torch.uint8)[:, None]
        labels = torch.from_numpy(digits.target)
        part = slice(None, -_TEST) if split == "train" else slice(-_TEST, None)
        return TensorImages(images[part], labels[part])
