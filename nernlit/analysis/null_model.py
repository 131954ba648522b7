"""A null model of a predictor's gain: noise with the size and the spectrum of a reconstruction's error, no predictor.

If the original plus such noise gains as much accuracy as a reconstruction, the gain is not due to the predictor.
Shapes: O filters, I channels, kh x kw kernels; a weight is reshaped to (O, I * kh * kw), which has r singular values.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from nernlit.analysis.finite import require_finite


@torch.no_grad()
def noise_like(errors: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """Random weights with the singular values of the errors of each layer, and so with their norm.

    The singular vectors are uniformly distributed orthonormal bases, independent of the errors.

    Args:
        errors: Reconstructed minus original weights (O, I, kh, kw) by state-dict key.
        generator: Draws the bases, on the CPU.

    Raises:
        UsageError: If an error is not finite.

    >>> error = torch.diag(torch.tensor([3.0, 4.0])).view(2, 2, 1, 1)
    >>> noise = noise_like({"conv.weight": error}, torch.Generator().manual_seed(0))
    >>> torch.linalg.svdvals(noise["conv.weight"].flatten(1)).round(decimals=3)
    tensor([4., 3.])
    """
    require_finite(errors)
    found = {}
    for key, error in errors.items():
        matrix = error.flatten(1).cpu().double()
        values_R = torch.linalg.svdvals(matrix)
        left, right = (_orthonormal(rows, len(values_R), generator) for rows in matrix.shape)
        found[key] = (left * values_R @ right.T).view_as(error).to(error)
    return found


def _orthonormal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """A matrix with orthonormal columns, uniformly distributed (Mezzadri, arXiv math-ph/0609050)."""
    gaussian = torch.randn(rows, columns, dtype=torch.float64, generator=generator)
    basis, triangular = torch.linalg.qr(gaussian)
    signed: Tensor = basis * triangular.diagonal().sign()
    return signed
