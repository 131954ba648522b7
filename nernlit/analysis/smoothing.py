"""Altering the original's weights directly, to ask whether a predictor's gain is mere smoothing.

Each function takes convolution weights by state-dict key and returns new ones; nothing is trained.
Shapes: O filters, I channels, kh x kw kernels, r singular values of the matrix (O, I * kh * kw).
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from nernlit.analysis.finite import require_finite
from nernlit.errors import UsageError

Weights = Mapping[str, Tensor]


def truncate_singular_values(weights: Weights, keep: float) -> dict[str, Tensor]:
    """Keep the largest singular values only, a share of every layer's (LASER: Sharma et al., arXiv 2312.13558).

    Raises:
        UsageError: If `keep` is no share, or a weight is not finite.
    """
    if not 0 < keep <= 1:
        raise UsageError(f"keep={keep}; expected a share of the singular values above 0 and up to 1.")
    require_finite(weights)
    return {key: _with_values(weight, lambda s: s * _first(len(s), keep).to(s)) for key, weight in weights.items()}


def shrink_singular_values(weights: Weights, by: float, keep: float = 0.5) -> dict[str, Tensor]:
    """Multiply the smaller singular values, all but a share `keep` of every layer's, with 1 - `by`.

    This raises low-frequency energy, as a predictor does, and moves little else.

    Raises:
        UsageError: If `by` or `keep` is no share, or a weight is not finite.
    """
    if not (0 <= by <= 1 and 0 <= keep <= 1):
        raise UsageError(f"by={by}, keep={keep}; expected shares between 0 and 1.")
    require_finite(weights)
    return {
        key: _with_values(weight, lambda s: s * (1 - by * ~_first(len(s), keep)).to(s))
        for key, weight in weights.items()
    }


def gaussian_smooth(table_NKK: Tensor, order: Sequence[Tensor], sigma: float) -> Tensor:
    """Replace every kernel by a Gaussian mean of its neighbors in an order.

    Args:
        table_NKK: Kernels (N, K, K).
        order: For each layer, its rows of the table in the order to walk along.
        sigma: Of the Gaussian, in places of the order; 0 leaves kernels as they are.

    Raises:
        UsageError: If `sigma` is negative.
    """
    if sigma < 0:
        raise UsageError(f"sigma={sigma}; expected 0 or more places.")
    if sigma == 0:
        return table_NKK.clone()
    reach = math.ceil(4 * sigma)
    places = torch.arange(-reach, reach + 1, dtype=table_NKK.dtype, device=table_NKK.device)
    weight_R = torch.exp(-0.5 * (places / sigma) ** 2)
    result = table_NKK.clone()
    for rows in order:
        walk_DM = table_NKK[rows].flatten(1).T
        pair = torch.stack([walk_DM.flatten(), torch.ones_like(walk_DM).flatten()]).view(-1, 1, walk_DM.shape[1])
        summed = torch.nn.functional.conv1d(pair, weight_R.view(1, 1, -1), padding=reach).view(2, *walk_DM.shape)
        result[rows] = (summed[0] / summed[1]).T.reshape(len(rows), *table_NKK.shape[1:])  # borders have fewer
    return result


def average(solutions: Sequence[Weights]) -> dict[str, Tensor]:
    """The mean of several solutions, for example of progressive rounds.

    Raises:
        UsageError: If there is none.
    """
    if not solutions:
        raise UsageError("no solutions to average; expected at least one.")
    return {key: torch.stack([weights[key] for weights in solutions]).mean(0) for key in solutions[0]}


def _first(count: int, share: float) -> Tensor:
    return torch.arange(count) < round(share * count)


def _with_values(weight: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    left, values, right = torch.linalg.svd(weight.flatten(1).double(), full_matrices=False)
    changed: Tensor = (left * change(values)) @ right
    return changed.view_as(weight).to(weight.dtype)
