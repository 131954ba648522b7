"""Weights that can be analyzed: finite ones."""

from collections.abc import Mapping

from torch import Tensor

from nernlit.errors import UsageError


def require_finite(weights: Mapping[str, Tensor]) -> None:
    """Refuse infinite and undefined weights by name.

    Raises:
        UsageError: With the first such entry of the state dict.
    """
    for key, weight in weights.items():
        bad = int((~weight.isfinite()).sum())
        if bad:
            raise UsageError(
                f"{bad} of the {weight.numel()} values of {key!r} are not finite, so it cannot be analyzed; "
                "the fit diverged. Pass an earlier checkpoint, or fit with a smaller learning rate."
            )
