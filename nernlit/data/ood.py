"""Published test sets of other distributions: CIFAR-10-C, CIFAR-100-C, ImageNet-R."""

from abc import ABC
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from timm.data import ImageNetInfo

from nernlit.data.decode import ResizeCenterCrop
from nernlit.data.eval_sets import SEVERITIES, EvalSet, require_known
from nernlit.data.sources import ArrayImages, ImageSource
from nernlit.data.trees import class_folders, tree_images
from nernlit.errors import DataError


class _CifarC(EvalSet, ABC):
    """Hendrycks and Dietterich (arXiv 1903.12261): `<root>/<corruption>.npy` and `labels.npy`.

    Each file has 50,000 images; those of severity s are (s - 1) * 10,000 .. s * 10,000 - 1.
    """

    folder: str
    expected_classes: int
    address: str

    #: The fifteen corruptions of the benchmark; four further files are published with them.
    standard = (
        *("gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
        *("snow", "frost", "fog", "brightness", "contrast", "elastic_transform", "pixelate", "jpeg_compression"),
    )
    extra = ("speckle_noise", "gaussian_blur", "spatter", "saturate")

    def __init__(
        self, root: str, corruptions: Sequence[str] | None = None, severities: Sequence[int] = SEVERITIES
    ) -> None:
        self.root, self.severities = Path(root), list(severities)
        self.corruptions = list(self.standard if corruptions is None else corruptions)
        require_known(self.folder, self.corruptions, self.standard + self.extra, self.severities)

    @property
    def name(self) -> str:
        return self.folder.lower().replace("-", "")

    def conditions(self, clean: ImageSource, num_classes: int) -> dict[str, ImageSource]:
        if num_classes != self.expected_classes:
            raise DataError(
                f"{self.folder} has {self.expected_classes} classes, the data has {num_classes}; use the test set of "
                "the data that the original was trained on."
            )
        labels = self._labels(clean)
        size = len(clean)
        found: dict[str, ImageSource] = {}
        for corruption in self.corruptions:
            images = self._read(corruption)
            if images.dtype != np.uint8 or images.shape != (len(labels), 32, 32, 3):
                raise DataError(
                    f"{self.root}/{corruption}.npy is {images.dtype} of shape {images.shape}; expected uint8 of "
                    f"{(len(labels), 32, 32, 3)}. {self._remedy}"
                )
            for severity in self.severities:
                part = slice((severity - 1) * size, severity * size)
                own = torch.from_numpy(labels[part])
                found[f"{corruption}_{severity}"] = ArrayImages(images[part], own)
        return found

    def _labels(self, clean: ImageSource) -> NDArray[np.int64]:
        """The labels, checked: equal for every severity, with as many of each class as the clean test images have."""
        labels, expected = self._read("labels"), len(SEVERITIES) * len(clean)
        wrong = None
        if labels.dtype.kind not in "iu" or labels.shape != (expected,):
            wrong = (
                f"is {labels.dtype} of shape {labels.shape}; expected integers of shape {(expected,)}, one per "
                f"severity for each of the {len(clean):,} clean test images"
            )
        elif labels.min() < 0 or labels.max() >= self.expected_classes:
            wrong = f"has labels from {labels.min()} to {labels.max()}; expected 0 to {self.expected_classes - 1}"
        else:
            blocks = labels.reshape(len(SEVERITIES), len(clean))
            odd = [
                str(severity) for severity, block in zip(SEVERITIES, blocks, strict=True) if (block != blocks[0]).any()
            ]
            counts, clean_counts = (
                np.bincount(own, minlength=self.expected_classes) for own in (blocks[0], clean.labels.numpy())
            )
            if odd:
                wrong = f"has other labels at severity {', '.join(odd)} than at severity 1; expected the same ones"
            elif not np.array_equal(counts, clean_counts):
                wrong = "does not have the labels of the clean test images; expected the published files for both"
        if wrong:
            raise DataError(f"{self.root}/labels.npy {wrong}. {self._remedy}")
        return labels.astype(np.int64)

    @property
    def _remedy(self) -> str:
        return f"Unpack {self.folder}.tar ({self.address}) and pass the folder of its .npy files as root."

    def _read(self, name: str) -> NDArray[Any]:
        file = self.root / f"{name}.npy"
        try:
            # Maps arrays of numbers only: no archives, and no pickles.
            mapped: NDArray[Any] = np.lib.format.open_memmap(file, mode="r")
        except Exception as error:  # a damaged header can raise any exception
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise DataError(f"cannot read {file} ({reason}). {self._remedy}") from error
        return mapped


@final
class CIFAR10C(_CifarC):
    """CIFAR-10-C as published.

    Args:
        root: Folder of the .npy files.
        corruptions: Their names; None takes the benchmark's fifteen.
        severities: Out of 1 to 5.
    """

    folder, expected_classes, address = "CIFAR-10-C", 10, "https://zenodo.org/records/2535967"


@final
class CIFAR100C(_CifarC):
    """CIFAR-100-C as published.

    Args:
        root: Folder of the .npy files.
        corruptions: Their names; None takes the benchmark's fifteen.
        severities: Out of 1 to 5.
    """

    folder, expected_classes, address = "CIFAR-100-C", 100, "https://zenodo.org/records/3555552"


@final
class ImageNetR(EvalSet):
    """ImageNet-R (Hendrycks et al., arXiv 2006.16241): renditions of 200 of ImageNet's classes, `<root>/<WordNet id>/`.

    Predictions are restricted to the 200 classes.

    Args:
        root: Folder of the 200 class folders.
        model: timm's name of the network; its image size, crop and interpolation are used.
    """

    name = "imagenet_r"

    def __init__(self, root: str, model: str = "resnet18.tv_in1k") -> None:
        self.root, self.fitting = Path(root), ResizeCenterCrop.from_model(model)

    def conditions(self, clean: ImageSource, num_classes: int) -> dict[str, ImageSource]:
        ids = (files("timm.data") / "_info" / "imagenet_r_synsets.txt").read_text(encoding="utf-8").split()
        every = ImageNetInfo().label_names()
        if num_classes != len(every):
            raise DataError(
                f"ImageNet-R has 200 of ImageNet's 1,000 classes, and the data has {num_classes} classes; use it with "
                "ImageNetDataModule."
            )
        found = class_folders(self.root)
        if found != sorted(ids):
            raise DataError(
                f"{self.root} has {len(found)} class folders, {len(set(found) & set(ids))} of them ImageNet-R's 200; "
                "unpack imagenet-r.tar (https://github.com/hendrycks/imagenet-r) and pass its folder as root."
            )
        labels = {name: every.index(name) for name in found}
        self.classes = torch.tensor(sorted(labels.values()))
        return {"renditions": tree_images(self.root, labels, self.fitting)}
