"""Reconstruction losses between predicted kernels and the original's.

Shapes: any, equal for all arguments: a table of kernels (N, K, K), or all weights as a vector. A mask is true for
entries that are weights, and false outside the center crop of a smaller kernel. In place of booleans it may hold a
weight for each squared error.
"""

import torch
from torch import Tensor


def _check(predicted: Tensor, target: Tensor, mask: Tensor | None) -> None:
    if predicted.shape != target.shape or (mask is not None and mask.shape != target.shape):
        masked = "" if mask is None else f", mask {tuple(mask.shape)}"
        raise ValueError(
            f"predicted {tuple(predicted.shape)}, target {tuple(target.shape)}{masked}: expected equal shapes."
        )


def reconstruction_mse(
    predicted: Tensor, target: Tensor, mask: Tensor | None = None, num_weights: float | None = None
) -> Tensor:
    """Mean squared error over all given weights (one mean, not one per layer).

    Args:
        predicted: Predicted weights, with gradients.
        target: The original's weights.
        mask: The entries that are weights, or a weight for each squared error; None for all.
        num_weights: The number that the sum of squares is divided by, if these kernels are only a part of the batch
            (one process of several); by default the sum of the mask.

    Raises:
        ValueError: If the shapes differ; broadcasting would hide the mistake.

    >>> reconstruction_mse(torch.zeros(4, 3, 3), torch.full((4, 3, 3), 0.5))
    tensor(0.2500)
    """
    _check(predicted, target, mask)
    errors = (predicted - target).square()
    if mask is not None:
        errors = errors * mask
    if num_weights is None:
        return errors.mean() if mask is None else errors.sum() / mask.sum()
    return errors.sum() / num_weights


def reconstruction_rmse(predicted: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Root of `reconstruction_mse`: L_recon as NeRN's code computes it (arXiv 2212.13554; arXiv 2407.00356, eq. 1).

    >>> reconstruction_rmse(torch.zeros(4, 3, 3), torch.full((4, 3, 3), 0.5))
    tensor(0.5000)
    """
    return root(reconstruction_mse(predicted, target, mask))


def root(errors: Tensor) -> Tensor:
    """The square root, with gradient 0 at 0, where it would be infinite: a predictor without error does not change."""
    exact = errors == 0
    return errors.masked_fill(exact, 1).sqrt().masked_fill(exact, 0)


def explained_power(predicted: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """1 - mean squared error / mean squared weight: 1 for an exact prediction, 0 for a prediction of zeros.

    Unlike the explained variance, neither term subtracts a mean.

    >>> explained_power(torch.full((2, 1, 1), 0.9), torch.ones(2, 1, 1))
    tensor(0.9900)
    """
    power = reconstruction_mse(torch.zeros_like(target), target, mask)
    return 1 - reconstruction_mse(predicted, target, mask) / power
