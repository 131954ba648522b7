"""NeRN's positional encoding of an address index (arXiv 2212.13554, section 3.1)."""

import math

import torch
from torch import Tensor

from nernlit.errors import UsageError


class FourierEncoding:
    """An integer index x becomes `sin(pi * base^i * x), cos(pi * base^i * x)` for i = 0 .. num_frequencies-1.

    x is the raw index. NeRN's code has an option to normalize it that has no effect; with normalized indices training
    is much slower.

    Args:
        num_frequencies: Frequencies per index; NeRN uses 40.
        base: Ratio of neighboring frequencies; NeRN uses 0.76.

    >>> FourierEncoding(num_frequencies=2, base=0.5).table(2).round(decimals=3)
    tensor([[ 0.,  1.,  0.,  1.],
            [ 0., -1.,  1.,  0.]])
    """

    def __init__(self, num_frequencies: int = 40, base: float = 0.76) -> None:
        if num_frequencies < 1 or not 0 < base < float("inf"):
            raise UsageError(
                f"num_frequencies={num_frequencies}, base={base}; expected at least one frequency and a positive base."
            )
        self.num_frequencies = num_frequencies
        self.base = base

    @property
    def width(self) -> int:
        """Length of the encoding of one index."""
        return 2 * self.num_frequencies

    def table(self, count: int) -> Tensor:
        """The encodings of 0 .. count-1, (count, width) float32: (sin, cos) of each frequency in turn.

        Computed in float64: at index 511 the largest phase is 1,605 radians, which float32 resolves to about 1e-4 only.
        """
        frequencies = math.pi * self.base ** torch.arange(self.num_frequencies, dtype=torch.float64)
        phases = torch.arange(count, dtype=torch.float64)[:, None] * frequencies
        return torch.stack([phases.sin(), phases.cos()], dim=-1).flatten(1).float() + 0.0
