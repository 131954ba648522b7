"""Baselines of `nernlit compare` without training: magnitude pruning and truncated SVD.

Shapes: a weight is a matrix of its first dimension O by all others n, r is its number of singular values.
"""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from nernlit.errors import UsageError

_LEFT, _RIGHT = ".left", ".right"


def pruned(weights: Mapping[str, Tensor], density: float) -> dict[str, Tensor]:
    """Set the weights of smallest magnitude to zero, over all layers together.

    Args:
        weights: The weights of the layers by name.
        density: Share of the numbers of all weights that is kept, above 0 and up to 1.

    Raises:
        UsageError: If `density` is outside of this range.
    """
    _require_share("density", density)
    magnitudes = torch.cat([value.abs().flatten() for value in weights.values()])
    kept = torch.zeros_like(magnitudes, dtype=torch.bool)
    kept[magnitudes.topk(max(1, round(density * len(magnitudes)))).indices] = True
    parts = kept.split([value.numel() for value in weights.values()])
    return {key: value * part.view_as(value) for (key, value), part in zip(weights.items(), parts, strict=True)}


def factorized(state: Mapping[str, Tensor], keys: Collection[str], share: float) -> dict[str, Tensor]:
    """Replace weights by two factors of their largest singular values: `<key>.left` (O, r) and `<key>.right` (r, n).

    Args:
        state: A state dict.
        keys: Its weights. One for which no two factors have fewer numbers stays as it is.
        share: Numbers of the factors / numbers of the weight, above 0 and up to 1; at least one singular value is kept.

    Raises:
        UsageError: If `share` is outside of this range, or a key is not in the state dict.
    """
    _require_share("share", share)
    if unknown := sorted(set(keys) - set(state)):
        raise UsageError(f"the state dict has no {unknown[0]!r}; pass keys of it.")
    result = {}
    for key, value in state.items():
        matrix_On = value.flatten(1) if key in keys else value.new_empty(0, 0)
        rank = max(1, int(share * matrix_On.numel() / max(1, sum(matrix_On.shape)) + 1e-9))
        if rank * sum(matrix_On.shape) >= matrix_On.numel():
            result[key] = value
            continue
        left_Or, values_r, right_rn = torch.linalg.svd(matrix_On.double(), full_matrices=False)
        root_r = values_r[:rank].sqrt()
        result[key + _LEFT] = (left_Or[:, :rank] * root_r).to(value)
        result[key + _RIGHT] = (root_r[:, None] * right_rn[:rank]).to(value)
    return result


def multiplied(stored: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a network from those of `factorized`, in the shapes and types of its state dict.

    >>> state = {"weight": torch.outer(torch.arange(4.0), torch.arange(6.0)).view(4, 2, 3)}
    >>> torch.allclose(multiplied(factorized(state, ["weight"], 0.5), state)["weight"], state["weight"], atol=1e-5)
    True
    """
    whole = {}
    for key, value in state.items():
        if key + _LEFT in stored:
            product = stored[key + _LEFT].to(value) @ stored[key + _RIGHT].to(value)
            whole[key] = product.view(value.shape)
        elif key in stored:
            whole[key] = stored[key].to(value)
    return whole


def _require_share(name: str, value: float) -> None:
    if not 0 < value <= 1:
        raise UsageError(f"{name}={value}; expected a share of the numbers above 0 and up to 1.")
