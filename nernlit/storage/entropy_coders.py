"""Writing and reading of models and integers. `Coder` defines the format once; subclasses write, read or count bits."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import final

import constriction
import numpy as np
from numpy.typing import NDArray

from nernlit.errors import FileFormatError
from nernlit.storage.entropy_models import (
    CORRECTION_LEVELS,
    EXPONENTS,
    MAX_BINS,
    MAX_CORRECTION,
    SLOPES,
    STEPS,
    Ints,
    Model,
    code_lengths,
    correction_counts,
    free_counts,
)

_Categorical = constriction.stream.model.Categorical
_Uniform = constriction.stream.model.Uniform
#: Bits that are coded at once where all integers are equally probable.
_CHUNK = 16
#: Probabilities of a model's integers by their length in bits: short ones are frequent.
_LENGTHS = free_counts(np.array([0, *range(6, 4 * 68, 4)]))
#: Probabilities that a group has a new model (0), or repeats the previous one (1).
_REPEATED = free_counts(np.array([0, 4]))


class Coder(ABC):
    """Writes or reads.

    A writer returns the values that it is given. A reader uses only the number of the values that it is given, and
    returns those that it reads.
    """

    @abstractmethod
    def symbols(self, values_N: Ints, counts_S: Ints) -> Ints:
        """Integers from 0 to S - 1 with the probabilities of `free_counts`, S at least 2."""

    @abstractmethod
    def equally_probable(self, values_N: Ints, size: int) -> Ints:
        """Uniformly distributed integers 0 .. size - 1, with a size of 2 to 2 ** 16."""

    @abstractmethod
    def below(self, values_N: Ints, sizes_N: Ints) -> Ints:
        """Integers from 0 to size - 1 that are equally probable, each with a size of its own."""

    @final
    def model(self, model: Model, previous: Model) -> Model:
        """A model, given the one before it."""
        if self._symbol(int(model == previous), _REPEATED):
            return previous
        lowest = previous.lowest + self._integer(model.lowest - previous.lowest)
        shift = previous.shift + self._integer(model.shift - previous.shift)
        bins = previous.bins + self._integer(model.bins - previous.bins)
        if not (-(2**63) <= lowest < 2**63 and 0 <= shift < 64 and 1 <= bins <= MAX_BINS):
            raise FileFormatError("coded integers are damaged: a model is impossible.")
        if bins == 1:
            return Model(lowest, shift)
        slope = self._one_of(model.slope, range(SLOPES))
        skew, exponent = 0, 2
        if slope:
            skew = self._integer(model.skew)
            exponent = self._one_of(model.exponent, EXPONENTS)
            if abs(skew) >= bins:
                raise FileFormatError("coded integers are damaged: a model is impossible.")
        step = self._one_of(model.step, STEPS)
        kind, corrections = 0, np.zeros(0, dtype=np.int64)
        if step:
            kind = self._one_of(model.kind, range(len(CORRECTION_LEVELS)))
            given_S = np.array(model.corrections if len(model.corrections) == bins else [0] * bins)
            corrections = self.symbols(given_S + MAX_CORRECTION, correction_counts(kind)) - MAX_CORRECTION
        return Model(lowest, shift, bins, skew, exponent, slope, step, kind, tuple(corrections.tolist()))

    @final
    def integers(self, integers_N: Ints, model: Model) -> Ints:
        """Integers of a model's distribution."""
        bins_N, places_N = model.split(integers_N)
        bins_N = self.symbols(bins_N, model.free_counts()) if model.bins > 1 else np.zeros_like(bins_N)
        return model.join(bins_N, self._bits(places_N, model.shift))

    def _bits(self, values_N: NDArray[np.uint64], bits: int) -> NDArray[np.uint64]:
        """Uniformly distributed integers of `bits` bits, least significant bits first."""
        read_N = np.zeros_like(values_N)
        for start in range(0, bits, _CHUNK):
            size = 1 << min(_CHUNK, bits - start)
            part_N = (values_N >> np.uint64(start) & np.uint64(size - 1)).astype(np.int64)
            read_N |= self.equally_probable(part_N, size).astype(np.uint64) << np.uint64(start)
        return read_N

    def _integer(self, value: int) -> int:
        """An integer of -2 ** 64 to 2 ** 64; small ones take few bits."""
        folded = 2 * value if value >= 0 else -2 * value - 1
        length = self._symbol(folded.bit_length(), _LENGTHS)
        read = 1 << length >> 1  # the first bit of its bits is 1
        for start in range(0, length - 1, _CHUNK):
            size = 1 << min(_CHUNK, length - 1 - start)
            read |= self._one_of(folded >> start & size - 1, range(size)) << start
        return -(read + 1 >> 1) if read % 2 else read >> 1

    def _symbol(self, value: int, counts_S: Ints) -> int:
        return int(self.symbols(np.array([value]), counts_S)[0])

    def _one_of(self, value: int, values: Sequence[int]) -> int:
        return values[int(self.equally_probable(np.array([values.index(value)]), len(values))[0])]


@final
class Writer(Coder):
    """Codes what it is given."""

    def __init__(self) -> None:
        self._coder = constriction.stream.queue.RangeEncoder()

    def symbols(self, values_N: Ints, counts_S: Ints) -> Ints:
        self._coder.encode(values_N.astype(np.int32), _exact(counts_S))
        return values_N

    def equally_probable(self, values_N: Ints, size: int) -> Ints:
        self._coder.encode(values_N.astype(np.int32), _Uniform(size))
        return values_N

    def below(self, values_N: Ints, sizes_N: Ints) -> Ints:
        if len(values_N):
            self._coder.encode(values_N.astype(np.int32), _Uniform(), sizes_N.astype(np.int32))
        return values_N

    def coded(self) -> NDArray[np.uint8]:
        """All that was coded."""
        words: NDArray[np.uint32] = self._coder.get_compressed()
        return words.astype("<u4").view(np.uint8)


@final
class Reader(Coder):
    """Decodes what a `Writer` coded.

    Args:
        coded: The bytes, a multiple of 4.
    """

    def __init__(self, coded: NDArray[np.uint8]) -> None:
        words = np.frombuffer(coded.tobytes(), dtype="<u4").astype(np.uint32)
        self._coder = constriction.stream.queue.RangeDecoder(words)

    def symbols(self, values_N: Ints, counts_S: Ints) -> Ints:
        return self._decoded(_exact(counts_S), len(values_N))

    def below(self, values_N: Ints, sizes_N: Ints) -> Ints:
        return self._decoded(_Uniform(), sizes_N.astype(np.int32)) if len(sizes_N) else values_N

    def equally_probable(self, values_N: Ints, size: int) -> Ints:
        return self._decoded(_Uniform(size), len(values_N))

    def _decoded(self, model: "constriction.stream.model.Model", argument: int | NDArray[np.int32]) -> Ints:
        try:
            read_N: NDArray[np.int32] = self._coder.decode(model, argument)
        except AssertionError as error:
            raise FileFormatError(f"coded integers are damaged: {error}") from error
        return read_N.astype(np.int64)

    def finish(self) -> None:
        """Require that all was read.

        Raises:
            FileFormatError: If there are more bytes.
        """
        if not self._coder.maybe_exhausted():
            raise FileFormatError("coded integers are damaged: there are more bytes than integers.")


@final
class Counter(Coder):
    """Counts the bits of what it is given.

    Attributes:
        bits: So far.
    """

    def __init__(self) -> None:
        self.bits = 0.0

    def symbols(self, values_N: Ints, counts_S: Ints) -> Ints:
        self.bits += float(code_lengths(counts_S)[values_N].sum())
        return values_N

    def equally_probable(self, values_N: Ints, size: int) -> Ints:
        self.bits += len(values_N) * math.log2(size)
        return values_N

    def below(self, values_N: Ints, sizes_N: Ints) -> Ints:
        self.bits += float(np.log2(sizes_N).sum())
        return values_N


def _exact(counts_S: Ints) -> "constriction.stream.model.Model":
    """constriction's model with exactly these probabilities.

    It adds 1 / 2 ** 24 to each probability and scales the rest so that all sum to 1. `free_counts` have the sum that
    the rest has already, so the factor is 1 and nothing is rounded.
    """
    return _Categorical(counts_S.astype(np.float64), perfect=False)
