"""Smoothing of the original's weights without a predictor, to test whether smoothing alone explains a predictor's gain.

Nothing is trained: each function maps convolution weights (by state-dict key) or kernels to smoothed ones.
Shapes: O filters, I channels, kh x kw kernels, r singular values of the matrix (O, I * kh * kw).
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from nernlit.analysis.finite import require_finite
from nernlit.errors import UsageError, require_at_least

Weights = Mapping[str, Tensor]


def truncate_singular_values(weights: Weights, keep: float) -> dict[str, Tensor]:
    """Set all but the largest singular values of every layer to zero (LASER: Sharma et al., arXiv 2312.13558).

    Args:
        weights: Convolution weights (O, I, kh, kw) by state-dict key.
        keep: Share of the singular values that is kept, above 0 and up to 1; rounded down, but at least one is kept.

    Raises:
        UsageError: If `keep` is outside of this range, or a weight is not finite.
    """
    if not 0 < keep <= 1:
        raise UsageError(f"keep={keep}; expected a share of the singular values above 0 and up to 1.")
    require_finite(weights)
    return {key: _with_values(weight, lambda s: s * _first(len(s), keep, 1).to(s)) for key, weight in weights.items()}


def shrink_singular_values(weights: Weights, by: float, keep: float = 0.5) -> dict[str, Tensor]:
    """Multiply all but the largest singular values of every layer by 1 - `by`.

    This increases the share of low-frequency energy, as a predictor does, with a small change of the weights.

    Args:
        weights: Convolution weights (O, I, kh, kw) by state-dict key.
        by: Relative decrease of the smaller singular values, between 0 and 1.
        keep: Share of the singular values that does not change, between 0 and 1; rounded down.

    Raises:
        UsageError: If `by` or `keep` is not between 0 and 1, or a weight is not finite.
    """
    if not (0 <= by <= 1 and 0 <= keep <= 1):
        raise UsageError(f"by={by}, keep={keep}; expected shares between 0 and 1.")
    require_finite(weights)
    return {
        key: _with_values(weight, lambda s: s * (1 - by * ~_first(len(s), keep)).to(s))
        for key, weight in weights.items()
    }


def gaussian_smooth(table_NKK: Tensor, order: Sequence[Tensor], sigma: float, mask_NKK: Tensor | None = None) -> Tensor:
    """Replace every kernel by a Gaussian-weighted mean of its neighbors in an order.

    Args:
        table_NKK: Kernels (N, K, K).
        order: For each layer, its rows of the table in order.
        sigma: Standard deviation of the Gaussian, in positions of the order; 0 changes nothing.
        mask_NKK: The entries that are weights; None for all. The others are zero and are not counted as neighbors.

    Raises:
        UsageError: If `sigma` is negative or not finite.
    """
    require_at_least(0, sigma=sigma)
    if sigma == 0:
        return table_NKK.clone()
    reach = math.ceil(4 * sigma)
    places = torch.arange(-reach, reach + 1, dtype=table_NKK.dtype, device=table_NKK.device)
    weight_R = torch.exp(-0.5 * (places / sigma) ** 2)
    result = table_NKK.clone()
    for rows in order:
        walk_DM = table_NKK[rows].flatten(1).T
        counted_DM = torch.ones_like(walk_DM) if mask_NKK is None else mask_NKK[rows].flatten(1).T.to(walk_DM)
        pair = torch.stack([walk_DM.flatten(), counted_DM.flatten()]).view(-1, 1, walk_DM.shape[1])
        summed = torch.nn.functional.conv1d(pair, weight_R.view(1, 1, -1), padding=reach).view(2, *walk_DM.shape)
        # Divided by the sum of the Gaussian's weights, which is smaller at the ends of the order and beside padding.
        result[rows] = (summed[0] / summed[1].clamp_min(torch.finfo(summed.dtype).tiny)).T.reshape(
            len(rows), *table_NKK.shape[1:]
        )
    return result


def average(solutions: Sequence[Weights]) -> dict[str, Tensor]:
    """The mean of the weights of several solutions, for example of progressive rounds.

    Raises:
        UsageError: If there is no solution.
    """
    if not solutions:
        raise UsageError("no solutions to average; expected at least one.")
    return {key: torch.stack([weights[key] for weights in solutions]).mean(0) for key in solutions[0]}


def _first(count: int, share: float, least: int = 0) -> Tensor:
    return torch.arange(count) < max(least, math.floor(share * count + 1e-9))


def _with_values(weight: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    left, values, right = torch.linalg.svd(weight.flatten(1).double(), full_matrices=False)
    changed: Tensor = (left * change(values)) @ right
    return changed.view_as(weight).to(weight.dtype)
