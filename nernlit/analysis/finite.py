"""A check of weights before an analysis."""

from collections.abc import Mapping

from torch import Tensor

from nernlit.errors import UsageError


def require_finite(weights: Mapping[str, Tensor]) -> None:
    """Check that all weights are finite.

    Raises:
        UsageError: If not; the message names the first such entry of the state dict.
    """
    for key, weight in weights.items():
        bad = int((~weight.isfinite()).sum())
        if bad:
            raise UsageError(
                f"{bad} of the {weight.numel()} values of {key!r} are not finite, so it cannot be analyzed; "
                "the fit diverged. Pass an earlier checkpoint, or fit with a smaller learning rate."
            )
