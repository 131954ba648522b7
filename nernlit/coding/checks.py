"""Checks in a .nern file that detect if it decodes to other weights than it was written from.

Shapes: L predicted layers.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self, final

import torch
from torch import Tensor

from nernlit.errors import FileFormatError, LayoutError, UsageError
from nernlit.kernels import Layout
from nernlit.storage.container import fingerprint

#: How much a layer's norm may differ from the stored one: machines add numbers in different orders.
_TOLERANCE = 1e-3


@final
@dataclass(frozen=True)
class Checks:
    """Fingerprints and norms; their bytes do not depend on the values of weights.

    Attributes:
        original: SHA-256 of the original's weights, in hexadecimal digits.
        reconstructed: SHA-256 of the reconstructed weights.
        norms: Euclidean norm of each predicted weight, (L,) float32.
    """

    original: str
    reconstructed: str
    norms: Tensor

    @classmethod
    def from_state(cls, original: str, layout: Layout, state: Mapping[str, Tensor]) -> Self:
        """The checks of a reconstructed network.

        Args:
            original: SHA-256 of the original's weights.
            layout: The predicted weights.
            state: The reconstructed network's state dict.

        Raises:
            UsageError: If a predicted weight is not finite.
        """
        norms_L = _norms(layout, state)
        for layer, norm in zip(layout.layers, norms_L.tolist(), strict=True):
            if not math.isfinite(norm):
                raise UsageError(
                    f"the predicted weights of {layer.key!r} are not finite; "
                    "use an earlier checkpoint, from before the fit diverged."
                )
        return cls(original, fingerprint(state), norms_L)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        """The inverse of `tensors`."""
        original, reconstructed = (_hexadecimal(tensors[f"checks.{name}"]) for name in ("original", "reconstructed"))
        return cls(original, reconstructed, tensors["checks.norms"])

    def tensors(self) -> dict[str, Tensor]:
        """The checks as tensors of a container."""
        hashes = {"original": self.original, "reconstructed": self.reconstructed}
        stored = {
            f"checks.{name}": torch.tensor(list(bytes.fromhex(value)), dtype=torch.uint8)
            for name, value in hashes.items()
        }
        return {**stored, "checks.norms": self.norms}

    def require_norms(self, layout: Layout, weights: Mapping[str, Tensor]) -> None:
        """Compare decoded weights with those that the file was written from.

        Raises:
            FileFormatError: If they differ.
            LayoutError: If there is not one norm for each layer.
        """
        if self.norms.shape != (len(layout.layers),) or self.norms.dtype != torch.float32:
            raise LayoutError("it does not have one norm for each layer.")
        for layer, norm, stored in zip(
            layout.layers, _norms(layout, weights).tolist(), self.norms.tolist(), strict=True
        ):
            if not math.isclose(norm, stored, rel_tol=_TOLERANCE):
                raise FileFormatError(
                    f"it decodes to another network than it was written from: the weights of {layer.key!r} have norm "
                    f"{norm:.6e} instead of {stored:.6e}. The predictor gives other values in this version of nernlit "
                    "or torch; use the versions that wrote the file."
                )


def _norms(layout: Layout, state: Mapping[str, Tensor]) -> Tensor:
    # In float64: independent of the number of threads up to the tolerance, and finite for large weights.
    return torch.stack([state[layer.key].double().norm() for layer in layout.layers]).float().cpu()


def _hexadecimal(value: Tensor) -> str:
    if value.shape != (32,) or value.dtype != torch.uint8:
        raise LayoutError("a SHA-256 of weights does not have 32 bytes.")
    return bytes(value.tolist()).hex()
