"""Models of integers for the entropy coder: probabilities in integer arithmetic, the same on every machine.

A model divides the range of a group's integers into bins. Each bin has a level, its code length in units of 1/8 bit up
to a constant: a smooth function of the distance from the most probable bin, `slope * distance ** (exponent / 2)`, plus
optionally a correction for each bin. The exponents 1 to 4 include the Laplace (2) and the normal distribution (4); a
slope of 0 is the uniform distribution. Within a bin, integers are equally probable.

Shapes: S bins, R possible corrections.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Self, final

import numpy as np
from numpy.typing import NDArray

#: Probabilities are multiples of 2 ** -PRECISION, as in constriction.
PRECISION = 24
#: Levels of one bit.
UNIT = 8
MAX_BINS = 4096
SLOPES = 128
EXPONENTS = (1, 2, 3, 4)
#: Step sizes of the corrections in levels; 0 for no corrections.
STEPS = (0, 1, 2, 4, 8)
#: Corrections are -MAX_CORRECTION to MAX_CORRECTION steps.
MAX_CORRECTION = 31
#: Levels of a correction of v steps: (first, next) is 0 for v = 0 and first + next * |v| otherwise.
CORRECTION_LEVELS = ((0, 4), (4, 8), (12, 12), (24, 16))

Ints = NDArray[np.int64]
Bytes = NDArray[np.uint8]


def _root(power: int) -> int:
    """The integer part of 2 ** (power / 8), in integer arithmetic."""
    return math.isqrt(math.isqrt(math.isqrt(1 << power)))


_SHARES = np.array([_root(30 * UNIT - part) for part in range(UNIT)])
_SLOPES = np.array([0, *(_root(2 * index) for index in range(1, SLOPES))])
_FIXED_POINT = 24  # fractional bits of slopes
_ROOT_BITS = 6  # fractional bits of the square roots of distances


@lru_cache
def _distances(exponent: int) -> Ints:
    """distance ** (exponent / 2) in units of 1 / 2 ** _ROOT_BITS for distances of 0, 1, 2, ... half bins."""
    powers = (distance**exponent << 2 * _ROOT_BITS for distance in range(4 * MAX_BINS + 1))
    return np.array([math.isqrt(power) for power in powers])


def free_counts(levels_S: Ints) -> Ints:
    """Counts (S,) with the sum 2 ** PRECISION - S; the probability of bin s is (counts[s] + 1) / 2 ** PRECISION.

    >>> (free_counts(np.array([0, 8, 16])) + 1).tolist()  # bits 0, 1 and 2 more than the first
    [9586981, 4793490, 2396745]
    """
    whole_S, part_S = np.divmod(levels_S - levels_S.min(), UNIT)
    shares_S = _SHARES[part_S] >> np.minimum(whole_S, 62)
    counts_S: Ints = shares_S * (2**PRECISION - len(levels_S)) // shares_S.sum()
    counts_S[levels_S.argmin()] += 2**PRECISION - len(levels_S) - counts_S.sum()
    return counts_S


@lru_cache
def correction_counts(kind: int) -> Ints:
    """`free_counts` of the corrections -MAX_CORRECTION to MAX_CORRECTION."""
    first, following = CORRECTION_LEVELS[kind]
    sizes_R = np.abs(np.arange(-MAX_CORRECTION, MAX_CORRECTION + 1))
    return free_counts(np.where(sizes_R > 0, first + following * sizes_R, 0))


def code_lengths(counts_S: Ints) -> NDArray[np.float64]:
    """Bits of each bin, from what `free_counts` returns."""
    return PRECISION - np.log2(counts_S + 1)


def entropy(histogram_S: Ints) -> float:
    """Bits that all integers of a histogram take at least, whatever the model is."""
    used_S = histogram_S[histogram_S > 0]
    return float(-(used_S * np.log2(used_S / used_S.sum())).sum())


@final
@dataclass(frozen=True)
class Model:
    """A distribution of integers.

    Attributes:
        lowest: The least integer.
        shift: A bin holds 2 ** shift integers.
        bins: Number of bins.
        skew: Position of the most probable place: half bins between it and the middle of the bins.
        exponent: See the module.
        slope: Index of the slope in `_SLOPES`: 0 is a slope of 0, and each increase by 4 doubles it.
        step: Levels of one correction step, one of STEPS.
        kind: Which of CORRECTION_LEVELS the corrections are coded with.
        corrections: Steps of each bin; empty without corrections.
    """

    lowest: int = 0
    shift: int = 0
    bins: int = 1
    skew: int = 0
    exponent: int = 2
    slope: int = 0
    step: int = 0
    kind: int = 0
    corrections: tuple[int, ...] = ()

    def levels(self) -> Ints:
        """Level of every bin, (S,)."""
        half_bins_S = np.abs(2 * np.arange(self.bins) - (self.bins - 1) - self.skew)
        levels_S: Ints = _SLOPES[self.slope] * _distances(self.exponent)[half_bins_S] >> _FIXED_POINT + _ROOT_BITS
        return levels_S if not self.corrections else levels_S + self.step * np.array(self.corrections)

    def free_counts(self) -> Ints:
        """See `free_counts`."""
        return free_counts(self.levels())

    def covers(self, lowest: int, highest: int) -> bool:
        """Whether all integers of a range have a bin."""
        return self.lowest <= lowest and highest < self.lowest + (self.bins << self.shift)

    def histogram(self, integers_N: Ints) -> Ints:
        """How many of the integers lie in each bin, (S,)."""
        histogram_S: Ints = np.bincount(self.split(integers_N)[0], minlength=self.bins)
        return histogram_S

    def split(self, integers_N: Ints) -> tuple[Ints, NDArray[np.uint64]]:
        """The bins of integers and their places within the bins, both (N,)."""
        # Differences of int64 need 64 bits without a sign; arithmetic modulo 2 ** 64 is exact.
        offsets_N = integers_N.view(np.uint64) - np.uint64(self.lowest % 2**64)
        bins_N = (offsets_N >> np.uint64(self.shift)).view(np.int64)
        return bins_N, offsets_N & np.uint64((1 << self.shift) - 1)

    def join(self, bins_N: Ints, places_N: NDArray[np.uint64]) -> Ints:
        """The inverse of `split`."""
        offsets_N = (bins_N.view(np.uint64) << np.uint64(self.shift)) | places_N
        return (offsets_N + np.uint64(self.lowest % 2**64)).view(np.int64)

    @classmethod
    def covering(cls, lowest: int, highest: int) -> Self:
        """The uniform distribution with the narrowest bins of which MAX_BINS cover a range."""
        shift = max(0, ((highest - lowest) // MAX_BINS).bit_length())
        return cls(lowest, shift, ((highest - lowest) >> shift) + 1)


def candidates(model: Model, histogram_S: Ints) -> Iterator[Model]:
    """Models with the bins of a given one that suit a histogram, for the encoder to choose from.

    Floating-point numbers decide only which models these are. What a model's probabilities are does not depend on them.
    """
    yield model
    if model.bins == 1:
        return
    shaped = [
        _fitted_slope(replace(model, skew=skew, exponent=exponent), histogram_S)
        for exponent in EXPONENTS
        for skew in _skews(model, histogram_S)
    ]
    best = sorted(shaped, key=lambda each: _bits(each, histogram_S))[:2]
    yield from best
    least = entropy(histogram_S)
    for each in (model, *best):
        for step in STEPS[1:]:
            for kind in range(len(CORRECTION_LEVELS)):
                if _bits(each, histogram_S) - least > model.bins * code_lengths(correction_counts(kind)).min():
                    yield _corrected(replace(each, step=step, kind=kind), histogram_S)


def _bits(model: Model, histogram_S: Ints) -> float:
    """Bits of a histogram, up to the rounding of probabilities; faster than with `code_lengths`."""
    lengths_S = model.levels() / UNIT
    return float(histogram_S @ lengths_S + histogram_S.sum() * np.log2(np.exp2(-lengths_S).sum()))


def _skews(model: Model, histogram_S: Ints) -> set[int]:
    """Places for the most probable integer: the mean, and the fullest bin."""
    places_S = 2 * np.arange(model.bins) - (model.bins - 1)
    mean = float((histogram_S * places_S).sum() / histogram_S.sum())
    return {round(mean), int(places_S[histogram_S.argmax()])}


def _fitted_slope(model: Model, histogram_S: Ints) -> Model:
    """The model with the slope of the fewest bits; the bits fall to one minimum and then rise."""
    low, high = 0, SLOPES - 1
    while low < high:
        middle = (low + high) // 2
        here, following = (replace(model, slope=slope) for slope in (middle, middle + 1))
        change = _bits(following, histogram_S) - _bits(here, histogram_S)
        still_flat = not following.levels().any()  # its slope rounds to 0 everywhere
        low, high = (middle + 1, high) if change < 0 or still_flat else (low, middle)
    return replace(model, slope=low)


def _corrected(model: Model, histogram_S: Ints) -> Model:
    """The model with corrections of a small sum of their own bits and the histogram's."""
    steps_R = np.arange(-MAX_CORRECTION, MAX_CORRECTION + 1)
    own_R = code_lengths(correction_counts(model.kind))
    base_S, total = model.levels() / UNIT, histogram_S.sum()
    corrections_S = np.zeros(model.bins, dtype=np.int64)
    for _ in range(3):
        # With probabilities 2 ** -l of sum 1, the bits of n symbols are sum(count * l) + n * log2(sum(2 ** -l)). To
        # first order each bin adds count * l + n * 2 ** -l / ln 2, whatever the others are.
        lengths_S = base_S + corrections_S * model.step / UNIT
        base_S = base_S + np.log2(np.exp2(-lengths_S).sum())
        lengths_SR = base_S[:, None] + steps_R * (model.step / UNIT)
        bits_SR = histogram_S[:, None] * lengths_SR + total / math.log(2) * np.exp2(-lengths_SR) + own_R
        corrections_S = steps_R[bits_SR.argmin(1)]
    return replace(model, corrections=tuple(corrections_S.tolist()))
