"""Comparing two classifiers on the same images."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from scipy.stats import binomtest
from torch import Tensor

from nernlit.errors import UsageError


@dataclass(frozen=True)
class PairedDifference:
    """Accuracy of one classifier minus accuracy of another, on the same images.

    Attributes:
        difference: In shares of the images.
        low: Lower end of the 95% interval (normal approximation of the paired difference).
        high: Its upper end.
        p_value: Exact McNemar test: how likely so uneven a split of the images that only one of the two got right is if
            both are equally good.
    """

    difference: float
    low: float
    high: float
    p_value: float


@torch.no_grad()
def correct_answers(classify: Callable[[Tensor], Tensor], batches: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """Which images a classifier gets right, (N,) booleans in the batches' order.

    Args:
        classify: Pixels (B, C, H, W) to logits.
        batches: Pixels and labels.

    Raises:
        UsageError: If a logit is not a number: the largest of an image's logits is then undefined.
        ValueError: If there is no image.
    """
    correct = []
    for images_BCHW, labels_B in batches:
        logits_BC = classify(images_BCHW)
        undefined = int(logits_BC.isnan().any(1).sum())
        if undefined:
            raise UsageError(
                f"the network's logits are not numbers for {undefined} of {len(logits_BC)} images, so it has no "
                "accuracy; the fit diverged. Pass an earlier checkpoint, or fit with a smaller learning rate."
            )
        correct.append(logits_BC.argmax(1) == labels_B)
    if not correct:
        raise ValueError("no images to measure on.")
    return torch.cat(correct)


def paired_difference(correct: Tensor, reference: Tensor) -> PairedDifference:
    """How much better `correct` is than `reference`, both (N,) booleans over the same N images.

    Raises:
        ValueError: If the shapes differ or there is no image.

    >>> paired_difference(torch.tensor([1, 1, 1, 0]).bool(), torch.tensor([1, 0, 0, 0]).bool()).difference
    0.5
    """
    if correct.shape != reference.shape or not correct.numel():
        raise ValueError(f"{tuple(correct.shape)} and {tuple(reference.shape)} answers: expected as many, and some.")
    count = correct.numel()
    gained = int(torch.count_nonzero(correct & ~reference))
    lost = int(torch.count_nonzero(~correct & reference))
    difference = (gained - lost) / count
    error = math.sqrt(max(gained + lost - (gained - lost) ** 2 / count, 0)) / count
    p_value = float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0
    return PairedDifference(difference, difference - 1.96 * error, difference + 1.96 * error, p_value)
