"""Comparison of two classifiers on the same images."""

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
        difference: Difference of the accuracies, as a fraction of the images.
        low: Lower end of the 95% confidence interval (normal approximation of the paired difference).
        high: Upper end of the interval.
        p_value: Two-sided p-value of the exact McNemar test of equal accuracy.
    """

    difference: float
    low: float
    high: float
    p_value: float


def is_correct(logits_BC: Tensor, labels_B: Tensor) -> Tensor:
    """Whether each image is classified correctly, (B,) booleans; one with logits that are not finite is not.

    >>> is_correct(torch.tensor([[0.0, 1.0], [math.nan, 0.0]]), torch.tensor([1, 0]))
    tensor([ True, False])
    """
    return (logits_BC.argmax(1) == labels_B) & logits_BC.isfinite().all(1)


@torch.no_grad()
def correct_answers(classify: Callable[[Tensor], Tensor], batches: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """Whether each image is classified correctly: (N,) booleans in the order of the batches; see `is_correct`.

    Args:
        classify: Maps pixels (B, C, H, W) to logits.
        batches: Pixels and labels.

    Raises:
        UsageError: If a logit is NaN, which leaves the predicted class undefined.
        ValueError: If there is no image.
    """
    correct = []
    for images_BCHW, labels_B in batches:
        logits_BC = classify(images_BCHW)
        undefined = int(logits_BC.isnan().any(1).sum())
        if undefined:
            raise UsageError(
                f"the network's logits are NaN for {undefined} of {len(logits_BC)} images, so its accuracy is "
                "undefined; the fit diverged. Pass an earlier checkpoint, or fit with a smaller learning rate."
            )
        correct.append(is_correct(logits_BC, labels_B))
    if not correct:
        raise ValueError("no images to measure on.")
    return torch.cat(correct)


def paired_difference(correct: Tensor, reference: Tensor) -> PairedDifference:
    """The accuracy of `correct` minus that of `reference`, both (N,) booleans for the same N images.

    Raises:
        ValueError: If the shapes differ or there is no image.

    >>> paired_difference(torch.tensor([1, 1, 1, 0]).bool(), torch.tensor([1, 0, 0, 0]).bool()).difference
    0.5
    """
    if correct.shape != reference.shape or not correct.numel():
        raise ValueError(
            f"shapes {tuple(correct.shape)} and {tuple(reference.shape)}: expected equal shapes and at least one image."
        )
    count = correct.numel()
    gained = int(torch.count_nonzero(correct & ~reference))
    lost = int(torch.count_nonzero(~correct & reference))
    difference = (gained - lost) / count
    error = math.sqrt(max(gained + lost - (gained - lost) ** 2 / count, 0)) / count
    p_value = float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0
    return PairedDifference(difference, difference - 1.96 * error, difference + 1.96 * error, p_value)
