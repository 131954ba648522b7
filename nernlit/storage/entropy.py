"""Entropy coding of integers: few bits for frequent ones, exact on every machine.

The integers are coded in groups, for example the rounded weights of each layer, each with a model of its own
(`entropy_models`). A model takes two to five bytes for a narrow distribution, and a fraction of a bit if it equals the
previous model. One range coder writes models and integers into one stream (`entropy_coders`).

Rounded weights, which are related to their neighbors, take a tenth less with `encode_weights` (`entropy_adaptive`).

Shapes: N integers, G parts, P bytes.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from nernlit.errors import FileFormatError
from nernlit.storage.entropy_coders import Counter, Reader, Writer
from nernlit.storage.entropy_models import PRECISION, Bytes, Ints, Model, candidates, code_lengths, entropy

LARGEST_UNIFORM = 2**PRECISION - 1
#: The largest magnitude of weights that `encode_weights` codes.
LARGEST_WEIGHT = 2**16 - 1
#: Rows, columns, height and width of a layer's weights: its filters, its channels, and the sides of its kernels. They
#: are 1 where there is none, as in the kernels of a matrix.
Part = tuple[int, int, int, int]


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
    """Integers coded as (P,) uint8, each uniformly distributed over 0 .. size - 1 with a size of its own.

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


def encode_weights(integers_N: Tensor, parts: Sequence[Part]) -> Tensor:
    """Coded weights of quantized layers or matrices, (P,) uint8; the code learns what related weights have in common.

    Args:
        integers_N: Integers, one part after the other.
        parts: The shape of each part.

    Raises:
        ValueError: If there are more or fewer integers than in the parts, or one has more than 16 bits.

    >>> packed = encode_weights(torch.tensor([0, 1, 0, 0, -1, 2]), [(3, 2, 1, 1)])
    >>> decode_weights(packed, [(3, 2, 1, 1)]).tolist()
    [0, 1, 0, 0, -1, 2]
    """
    numbers_N = integers_N.detach().cpu().numpy().astype(np.int64)
    if numbers_N.shape != (sum(map(math.prod, parts)),):
        raise ValueError(f"integers of shape {numbers_N.shape} in parts of {list(parts)}; expected the same number.")
    if len(numbers_N) and np.abs(numbers_N).max() > LARGEST_WEIGHT:
        raise ValueError(f"an integer is outside -{LARGEST_WEIGHT}..{LARGEST_WEIGHT}.")
    stream_P, length = _adaptive_code()(numbers_N, _filled(parts), np.zeros(0, np.uint8), False)
    return torch.from_numpy(stream_P[:length].copy())


def decode_weights(packed_P: Tensor, parts: Sequence[Part]) -> Tensor:
    """The integers (N,) int64 that `encode_weights` coded.

    Memory is 8 bytes for each integer and 4 MiB, whatever the coded bytes are.

    Raises:
        FileFormatError: If the bytes are not those of such parts.
    """
    if packed_P.dtype != torch.uint8 or packed_P.dim() != 1:
        raise FileFormatError(f"coded weights are {packed_P.dtype} of shape {tuple(packed_P.shape)}; expected bytes.")
    numbers_N = np.zeros(sum(map(math.prod, parts)), np.int64)
    _, length = _adaptive_code()(numbers_N, _filled(parts), packed_P.cpu().numpy().copy(), True)
    if length != len(packed_P):
        raise FileFormatError(f"coded weights are damaged: they have {len(packed_P)} bytes; expected {length}.")
    return torch.from_numpy(numbers_N)


def _adaptive_code() -> Callable[[Ints, Ints, Bytes, bool], tuple[Bytes, int]]:
    from nernlit.storage.entropy_adaptive import compiled_code  # imported here: numba takes half a second to import

    return compiled_code()


def _filled(parts: Sequence[Part]) -> Ints:
    """The shapes of the parts that are not empty, (G, 4)."""
    return np.array([part for part in parts if math.prod(part)], np.int64).reshape(-1, 4)


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
