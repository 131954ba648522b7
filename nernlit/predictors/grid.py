"""Rounding with straight-through gradients, and the entropy of quantized values.

The values of a group share a step size and a probability model; groups are consecutive.

Shapes: n numbers in G groups.
"""

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

#: Rounded numbers are between -LIMIT and LIMIT.
LIMIT = 2**15
#: Numbers that are added one after the other.
_PART = 128


def round_ste(values_n: Tensor) -> Tensor:
    """The nearest integers, at most `LIMIT` from 0; gradients pass through (straight-through estimator).

    >>> round_ste(torch.tensor([0.4, -1.7]))
    tensor([ 0., -2.])
    """
    return values_n + (values_n.round().clamp(-LIMIT, LIMIT) - values_n).detach()


def round_to_half(values: Tensor) -> Tensor:
    """The values rounded to float16, as float32; gradients pass through (straight-through estimator)."""
    return values + (values.half().float() - values).detach()


def repeat_per_group(values_G: Tensor, sizes: Sequence[int]) -> Tensor:
    """Each group's value once per number of the group, (n,).

    >>> repeat_per_group(torch.tensor([1.0, 2.0]), [1, 2])
    tensor([1., 2., 2.])
    """
    if len(values_G) == 1:
        return values_G.expand(sizes[0])
    return cast(Tensor, _Spread.apply(values_G, torch.tensor(sizes)))


def sum_per_group(values_n: Tensor, sizes: Sequence[int] | Tensor) -> Tensor:
    """The sum of each group's values, (G,).

    On the CPU `segment_reduce` adds the numbers of a group one after the other: of 40 million squares in float32 it
    would lose a tenth. Large groups are therefore added in parts, and the sums of the parts likewise.

    Args:
        values_n: The values.
        sizes: Numbers of each group, at least 1.

    >>> sum_per_group(torch.tensor([1.0, 2.0, 3.0]), [1, 2])
    tensor([1., 5.])
    """
    sizes_G = torch.as_tensor(sizes, device="cpu")
    if int(sizes_G.max()) > _PART:
        parts_G = (sizes_G + _PART - 1) // _PART
        sizes_P = torch.full((int(parts_G.sum()),), _PART)
        sizes_P[parts_G.cumsum(0) - 1] -= parts_G * _PART - sizes_G
        return sum_per_group(sum_per_group(values_n, sizes_P), parts_G)
    return torch.segment_reduce(values_n, "sum", lengths=sizes_G.to(values_n.device))


class _Spread(torch.autograd.Function):
    """`repeat_interleave` with a faster backward pass: torch's adds gradients one by one."""

    @staticmethod
    def forward(ctx: Any, values_G: Tensor, sizes_G: Tensor) -> Tensor:
        ctx.save_for_backward(sizes_G)
        return values_G.repeat_interleave(sizes_G.to(values_G.device))

    @staticmethod
    def backward(ctx: Any, grad_n: Tensor) -> tuple[Tensor, None]:
        (sizes_G,) = ctx.saved_tensors
        return sum_per_group(grad_n.contiguous(), sizes_G), None


class Counts:
    """How often each whole number occurs in each group: the model by which bits are estimated.

    Args:
        numbers_n: Whole numbers, of any floating-point type. Those of a fit that has diverged count as 0.
        sizes: Numbers of each group.
    """

    def __init__(self, numbers_n: Tensor, sizes: Sequence[int]) -> None:
        numbers_n = numbers_n.nan_to_num(0.0)
        self._sizes = sizes
        sizes_G = torch.tensor(sizes, device=numbers_n.device)
        lowest_G = torch.segment_reduce(numbers_n, "min", lengths=sizes_G).long() - 1
        width_G = torch.segment_reduce(numbers_n, "max", lengths=sizes_G).long() - lowest_G + 2
        first_G = width_G.cumsum(0) - width_G
        self._sizes_G, self._width_G, self._first_G = sizes_G, width_G, first_G
        # Place of number 0 of each number's group in the counts.
        self._origin_n = repeat_per_group(first_G - lowest_G, sizes)
        self._counts_X = (numbers_n.long() + self._origin_n).bincount(minlength=int(width_G.sum()))

    def entropies(self) -> Tensor:
        """The entropy of the numbers of each group, (G,) in bits per number."""
        counts_X = self._counts_X.double()
        sums_G = torch.segment_reduce(torch.xlogy(counts_X, counts_X), "sum", lengths=self._width_G)
        return self._sizes_G.double().log2() - sums_G / (self._sizes_G * math.log(2))

    def entropy_bits(self) -> Tensor:
        """The entropy of all numbers, a scalar in bits."""
        return self._sizes_G.double() @ self.entropies()

    def bits(self, values_n: Tensor) -> Tensor:
        """Bits of each value, (n,), with gradients; between two integers they are interpolated linearly."""
        # Half a count more for each number, so that numbers that do not occur have finite bits.
        total_X = (self._sizes_G + self._width_G / 2).repeat_interleave(self._width_G)
        bits_X = total_X.log2() - (self._counts_X + 0.5).log2()
        last_G = self._first_G + self._width_G - 2
        first_n, last_n = (repeat_per_group(places_G, self._sizes) for places_G in (self._first_G, last_G))
        low_n = (values_n.detach().nan_to_num(0.0).floor().long() + self._origin_n).clamp(first_n, last_n)
        below_n, above_n = bits_X[low_n], bits_X[low_n + 1]
        return below_n + (values_n - (low_n - self._origin_n)) * (above_n - below_n)
