"""Entropy coding of integers: few bits for frequent ones, exact on every machine.

The integers are coded in groups, for example the rounded weights of each layer, each with a model of its own
(`entropy_models`). A model takes two to five bytes where few integers differ, and a fraction of a bit where it repeats
the model before it. One range coder writes models and integers into one stream (`entropy_coders`).

Shapes: N integers, P bytes.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from nernlit.errors import FileFormatError
from nernlit.storage.entropy_coders import Counter, Reader, Writer
from nernlit.storage.entropy_models import PRECISION, Ints, Model, candidates, code_lengths, entropy

LARGEST_UNIFORM = 2**PRECISION - 1


def encode(integers_N: Tensor, groups: Sequence[int]) -> Tensor:
    """The coded integers, (P,) uint8.

    Args:
        integers_N: Integers of any integer type, one group after the other.
        groups: How many integers each group has; each group that is not empty gets a model.

    Raises:
        ValueError: If the numbers are not integers, or the groups do not have N integers together.

    >>> packed = encode(torch.tensor([0, 1, 0, 0, -1, 0, 300]), groups=[6, 1])
    >>> decode(packed, groups=[6, 1]).tolist()
    [0, 1, 0, 0, -1, 0, 300]
    """
    if integers_N.is_floating_point() or integers_N.is_complex() or integers_N.dim() != 1:
        raise ValueError(f"{integers_N.dtype} of shape {tuple(integers_N.shape)}; expected integers in one dimension.")
    if min(groups, default=0) < 0 or sum(groups) != len(integers_N):
        raise ValueError(f"{len(integers_N)} integers in groups of {list(groups)}; expected the same number.")
    values = integers_N.detach().cpu().to(torch.int64).contiguous().numpy()
    writer, previous, start = Writer(), Model(), 0
    for count in groups:
        if count:
            group = values[start : start + count]
            model = _best_model(group, previous)
            writer.model(model, previous)
            writer.integers(group, model)
            previous, start = model, start + count
    return torch.from_numpy(writer.coded())


def decode(packed_P: Tensor, groups: Sequence[int]) -> Tensor:
    """The integers (N,) int64 that `encode` coded.

    Memory is at most 64 bytes for each integer of the groups, whatever the coded bytes are: a caller that does not
    trust the groups limits their sum.

    Raises:
        FileFormatError: If the bytes are not those of such groups.
    """
    if min(groups, default=0) < 0:
        raise FileFormatError("a group of coded integers has less than 0 integers; expected at least 0.")
    reader, previous, parts = _reader(packed_P), Model(), [np.zeros(0, dtype=np.int64)]
    for count in groups:
        if count:
            previous = reader.model(previous, previous)
            parts.append(reader.integers(np.zeros(count, dtype=np.int64), previous))
    reader.finish()
    return torch.from_numpy(np.concatenate(parts))


def cost_bits(integers_N: Tensor, groups: Sequence[int]) -> int:
    """Bits of the coded integers with their models: 8 for each byte of `encode`.

    >>> cost_bits(torch.zeros(1000, dtype=torch.int8), [1000])
    32
    """
    return 8 * len(encode(integers_N, groups))


def encode_uniform(integers_N: Tensor, sizes_N: Tensor) -> Tensor:
    """Coded integers (P,) uint8, each of which has a size of its own: all integers from 0 to size - 1 are as probable.

    Args:
        integers_N: Integers.
        sizes_N: The size of each, 2 to LARGEST_UNIFORM.
    """
    writer = Writer()
    writer.below(integers_N.cpu().numpy(), sizes_N.cpu().numpy())
    return torch.from_numpy(writer.coded())


def decode_uniform(packed_P: Tensor, sizes_N: Tensor) -> Tensor:
    """The integers (N,) int64 that `encode_uniform` coded.

    Raises:
        FileFormatError: If the bytes are not those of integers of such sizes.
    """
    reader = _reader(packed_P)
    integers = reader.below(np.zeros(len(sizes_N), dtype=np.int64), sizes_N.cpu().numpy())
    reader.finish()
    return torch.from_numpy(integers)


def _reader(packed_P: Tensor) -> Reader:
    if packed_P.dtype != torch.uint8 or packed_P.dim() != 1 or len(packed_P) % 4:
        raise FileFormatError(
            f"coded integers are {packed_P.dtype} of shape {tuple(packed_P.shape)}; expected bytes, a multiple of 4."
        )
    return Reader(packed_P.cpu().numpy())


def _best_model(integers_N: Ints, previous: Model) -> Model:
    """The model with the fewest bits for a group's integers and for itself."""

    def bits(model: Model, histogram_S: Ints) -> float:
        in_bins = (histogram_S * code_lengths(model.free_counts())).sum()
        return float(_own_bits(model, previous) + in_bins + len(integers_N) * model.shift)

    lowest, highest = int(integers_N.min()), int(integers_N.max())
    binned = Model.covering(lowest, highest)
    histogram_S = binned.histogram(integers_N)
    again = bits(previous, previous.histogram(integers_N)) if previous.covers(lowest, highest) else math.inf
    # No new model is smaller than the uniform one, and none gives the integers less than their entropy.
    if again <= _own_bits(binned, previous) + entropy(histogram_S) + len(integers_N) * binned.shift:
        return previous
    best = min(candidates(binned, histogram_S), key=lambda model: bits(model, histogram_S))
    return best if bits(best, histogram_S) < again else previous


def _own_bits(model: Model, previous: Model) -> float:
    counter = Counter()
    counter.model(model, previous)
    return counter.bits
