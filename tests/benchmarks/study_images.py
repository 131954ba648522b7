"""What the study measures on images: accuracy, divergence from the original, and paired differences between settings.

Shapes: N images of C channels; logits (N, C) of C classes.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

from nernlit.analysis import PairedDifference, paired_difference
from nernlit.data import CIFAR10DataModule
from nernlit.representation import Representation

#: Images that are classified at once: the fastest on a CPU, and on a GPU.
_BATCH, _GPU_BATCH = 50, 1000


@dataclass(frozen=True)
class Split:
    """The images of a split, and the original's answers."""

    pixels: Tensor  # (N, C, H, W)
    labels: Tensor  # (N,)
    original: Tensor  # (N, C)


class Measured:
    """The validation and the test images of CIFAR-10.

    Args:
        root: The data's folder.
        representation: One of the original, whose answers are the reference.
        splits: The splits that are read.
    """

    def __init__(self, root: Path, representation: Representation, splits: Sequence[str] = ("val", "test")) -> None:
        self.data = CIFAR10DataModule(str(root))
        self.data.network = representation.original
        weights = representation.original_weights()
        self.splits = {name: self._split(name, representation, weights) for name in splits}

    def _split(self, name: str, representation: Representation, weights: Mapping[str, Tensor]) -> Split:
        self.data.setup("test" if name == "test" else "validate")
        loader = self.data.test_dataloader()[0] if name == "test" else self.data.val_dataloader()
        batches = [self.data.on_after_batch_transfer(batch, 0) for batch in loader]
        pixels_NCHW, labels_N = (torch.cat(parts) for parts in zip(*batches, strict=True))
        return Split(pixels_NCHW, labels_N, logits(representation, weights, pixels_NCHW))

    def training_images(self, count: int) -> Iterator[Tensor]:
        """Batches of this many training images; they are decoded at the first call."""
        if "train" not in self.data.sources:
            self.data.setup("fit")
        return self.data.training_images(count, 0)

    def results(self, representation: Representation) -> dict[str, Any]:
        """Accuracy on both splits, divergence from the original in nats, and which images are classified correctly."""
        found: dict[str, Any] = {}
        with torch.no_grad():
            weights = representation.weights()
        for name, split in self.splits.items():
            logits_NC = logits(representation, weights, split.pixels)
            correct_N = logits_NC.argmax(1) == split.labels
            own, original = log_softmax(logits_NC, 1), log_softmax(split.original, 1)
            found[f"{name}_acc"] = float(correct_N.float().mean())
            found[f"{name}_kl"] = float(kl_div(own, original, reduction="batchmean", log_target=True))
            found[f"{name}_correct"] = np.packbits(correct_N.numpy()).tobytes().hex()
        return found


def logits(representation: Representation, weights: Mapping[str, Tensor], pixels_NCHW: Tensor) -> Tensor:
    """Logits (N, C) on the CPU; images and weights are moved to the representation's device."""
    device = representation.scale.device
    there = {key: value.to(device) for key, value in weights.items()}
    batches = pixels_NCHW.split(_BATCH if device.type == "cpu" else _GPU_BATCH)
    with torch.inference_mode():
        return torch.cat([representation(pixels.to(device), there).cpu() for pixels in batches])


def paired(line: Mapping[str, Any], reference: Mapping[str, Any], split: str) -> PairedDifference:
    """The difference in accuracy of two fits on the images of a split."""
    return paired_difference(*(_unpacked(each[f"{split}_correct"]) for each in (line, reference)))


def _unpacked(packed: str) -> Tensor:
    """Bits of a number of images that 8 divides."""
    return torch.from_numpy(np.unpackbits(np.frombuffer(bytes.fromhex(packed), np.uint8))).bool()
