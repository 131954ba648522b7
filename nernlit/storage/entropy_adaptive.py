"""The adaptive coder of quantized weights: context mixing in integer arithmetic, the same on every machine.

A number is coded as binary decisions: for each bit of its magnitude whether there are more, then the sign, then the
bits after the first. Several contexts, such as the weight's filter, its channel, and its neighbors in the kernel, each
have a probability for every decision. Logistic mixing combines them, as in PAQ: it adds the logits of the probabilities
with weights that are learned while coding. A binary range coder writes the decisions. Encoder and decoder are the same
functions, so that both learn the same.

numba compiles this module's functions: import it only where numbers are coded. All of them are in this file because
numba's cache notices changes of one file only; after a change of `entropy_tables`, change this file too.

Shapes: N numbers, G parts, C contexts of a decision, P bytes.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from nernlit.storage.entropy_models import Bytes, Ints
from nernlit.storage.entropy_tables import (
    LARGEST_COUNT,
    LARGEST_LOGIT,
    LOGIT_BITS,
    LOGIT_TABLE_BITS,
    LOGITS,
    PROBABILITIES,
    PROBABILITY_BITS,
    RATE_BITS,
    RATES,
    STATE_BITS,
)
from nernlit.utilities.compiled import compiled, jit_helper

#: Magnitudes have at most so many bits.
MAGNITUDE_BITS = 16
#: Decision 4 * k is whether a magnitude has more than k bits. 4 * k + 1 is the second bit of a magnitude of k bits;
#: 4 * k + 2 and 4 * k + 3 are its third bit after a second bit of 0 and of 1. Further bits are equally probable.
_SIGN = 4 * MAGNITUDE_BITS
_DECISIONS = _SIGN + 4
#: Contexts of a decision: all numbers, the row, the column, and three of the neighborhood.
_CONTEXTS = 6
#: Number of row contexts and of column contexts; row r uses context r % _LINE_CONTEXTS.
_LINE_CONTEXTS = 1024
#: Positions in a kernel with contexts of their own: 4 x 4.
_SIDE = 4
#: Values of each context of the neighborhood: 81 for each position.
_NEIGHBORHOODS = 81 * _SIDE**2
#: The numbers of contexts: 0 is that of all numbers, then come those of rows, columns, and neighborhoods.
_ROW = 1
_COLUMN = _ROW + _LINE_CONTEXTS
_NEIGHBORHOOD = _COLUMN + _LINE_CONTEXTS
_ALL_CONTEXTS = _NEIGHBORHOOD + 3 * _NEIGHBORHOODS
#: The largest count of a probability when a part starts: what was learned in other parts is less certain.
_KEPT_COUNT = 20
#: Fractional bits of mixing weights, their first value, and their learning rate as a shift: it is 2 ** -8.
_WEIGHT_BITS = 24
_FIRST_WEIGHT = 2**_WEIGHT_BITS // 5
_WEIGHT_SHIFT = LOGIT_BITS + PROBABILITY_BITS - _WEIGHT_BITS + 8
#: Bits of the ends of the range coder's interval, and the entries of its state.
_RANGE_BITS = 48
_LOW, _HIGH, _CODE, _PLACE = range(4)
#: Upper bound of the bytes that one number can take.
_MAX_NUMBER_BYTES = 256


class _Model(NamedTuple):
    """What coding learns.

    Attributes:
        probabilities: Of a 1, for every decision in every context.
        counts: How many decisions each has seen, at most LARGEST_COUNT.
        weights: Of the contexts of every decision, (decisions, C).
        logits: Room for the logits of one decision's contexts.
    """

    probabilities: NDArray[np.int32]
    counts: NDArray[np.int32]
    weights: Ints
    logits: Ints


@functools.cache
def compiled_code() -> Callable[[Ints, Ints, Bytes, bool], tuple[Bytes, int]]:
    """`_code`, compiled."""
    return compiled(
        _code, "the entropy coder", np.zeros(1, np.int64), np.ones((1, 4), np.int64), np.zeros(0, np.uint8), False
    )


def _code(numbers_N: Ints, shapes_G4: Ints, stream_P: Bytes, decodes: bool) -> tuple[Bytes, int]:
    """Encode numbers into a new stream, or decode a stream into `numbers_N`.

    Args:
        numbers_N: The numbers of all parts; decoding overwrites them.
        shapes_G4: Rows, columns, height and width of each part.
        stream_P: The stream to decode; empty to encode.
        decodes: Whether to decode.

    Returns:
        The stream, and how many of its bytes encode the numbers.
    """
    model = _Model(
        np.full((_ALL_CONTEXTS, _DECISIONS), 1 << STATE_BITS - 1, np.int32),
        np.zeros((_ALL_CONTEXTS, _DECISIONS), np.int32),
        np.full((_DECISIONS, _CONTEXTS), _FIRST_WEIGHT, np.int64),
        np.zeros(_CONTEXTS, np.int64),
    )
    coder = np.array([0, (1 << _RANGE_BITS) - 1, 0, 0])
    if decodes:
        for _ in range(_RANGE_BITS // 8):
            _read_byte(coder, stream_P)
    size_contexts, sign_contexts = np.zeros(_CONTEXTS, np.int64), np.zeros(_CONTEXTS, np.int64)
    n = 0
    for part in range(len(shapes_G4)):
        rows, columns, height, width = shapes_G4[part]
        _start_part(model)
        for row in range(rows):
            size_contexts[1] = sign_contexts[1] = _ROW + row % _LINE_CONTEXTS
            for column in range(columns):
                size_contexts[2] = sign_contexts[2] = _COLUMN + column % _LINE_CONTEXTS
                others = 0
                for y in range(height):
                    for x in range(width):
                        if not decodes and coder[_PLACE] + _MAX_NUMBER_BYTES > len(stream_P):
                            stream_P = np.concatenate((stream_P, np.zeros(len(stream_P) + _MAX_NUMBER_BYTES, np.uint8)))
                        _set_neighbor_contexts(numbers_N, n, y, x, width, others, size_contexts, sign_contexts)
                        number = _code_number(
                            numbers_N[n], size_contexts, sign_contexts, model, coder, stream_P, decodes
                        )
                        numbers_N[n] = number
                        others += number != 0
                        n += 1
    return stream_P, _finish(coder, stream_P, decodes)


@jit_helper
def _start_part(model: _Model) -> None:
    """Set the contexts for a new part.

    Columns start from the rows of the part before, because the channels of a layer are often the filters of the layer
    before; rows start from the probabilities of all numbers. The other contexts keep theirs.
    """
    model.probabilities[_COLUMN:_NEIGHBORHOOD] = model.probabilities[_ROW:_COLUMN]
    model.counts[_COLUMN:_NEIGHBORHOOD] = model.counts[_ROW:_COLUMN]
    model.probabilities[_ROW:_COLUMN] = model.probabilities[0]
    model.counts[_ROW:_COLUMN] = 0
    model.counts[:] = np.minimum(model.counts, _KEPT_COUNT)


@jit_helper
def _set_neighbor_contexts(
    numbers_N: Ints, n: int, y: int, x: int, width: int, others: int, size_contexts: Ints, sign_contexts: Ints
) -> None:
    """Set the contexts of number n's neighborhood: those of its magnitude, and those of its sign.

    Args:
        numbers_N: The numbers; those before n are known.
        n: Which number.
        y: Its row in its kernel.
        x: Its column in its kernel.
        width: Columns of its kernel.
        others: How many numbers before it in its kernel are not 0.
        size_contexts: The contexts of its magnitude.
        sign_contexts: The contexts of its sign.
    """
    left = numbers_N[n - 1] if x > 0 else 0
    left2 = numbers_N[n - 2] if x > 1 else 0
    up = numbers_N[n - width] if y > 0 else 0
    up2 = numbers_N[n - 2 * width] if y > 1 else 0
    up_left = numbers_N[n - width - 1] if x > 0 and y > 0 else 0
    up_right = numbers_N[n - width + 1] if x + 1 < width and y > 0 else 0
    last = _bits(numbers_N[n - 1]) if n > 0 else 0
    last2 = _bits(numbers_N[n - 2]) if n > 1 else 0
    near = 2 * (left + up) + up_left + up_right
    near_bits = 2 * (_bits(left) + _bits(up)) + _bits(up_left) + _bits(up_right)
    position = _NEIGHBORHOOD + 81 * (min(y, _SIDE - 1) * _SIDE + min(x, _SIDE - 1))
    size_contexts[3] = position + min(others, 80)
    size_contexts[4] = _NEIGHBORHOOD + _NEIGHBORHOODS + 17 * last + last2
    size_contexts[5] = position + 2 * _NEIGHBORHOODS + min(near_bits, 80)
    sides = 27 * _sign(left) + 9 * _sign(up)
    sign_contexts[3] = position + 40 + sides + 3 * _sign(up_left) + _sign(up_right)
    sign_contexts[4] = position + _NEIGHBORHOODS + 40 + _sign(near) * _bits(near)
    sign_contexts[5] = position + 2 * _NEIGHBORHOODS + 40 + sides + 3 * _sign(left2) + _sign(up2)


@jit_helper
def _bits(number: int) -> int:
    """Bits of a number's magnitude."""
    magnitude, bits = abs(number), 0
    while magnitude >> bits:
        bits += 1
    return bits


@jit_helper
def _sign(number: int) -> int:
    return int(number > 0) - int(number < 0)


@jit_helper
def _code_number(
    number: int, size_contexts: Ints, sign_contexts: Ints, model: _Model, coder: Ints, stream_P: Bytes, decodes: bool
) -> int:
    magnitude, bits = abs(number), 0
    while bits < MAGNITUDE_BITS:
        if not _decide(int(magnitude >> bits > 0), 4 * bits, size_contexts, model, coder, stream_P, decodes):
            break
        bits += 1
    if bits == 0:
        return 0
    is_negative = _decide(int(number < 0), _SIGN, sign_contexts, model, coder, stream_P, decodes)
    coded = 1
    for place in range(bits - 2, -1, -1):
        bit = magnitude >> place & 1
        if coded < 4:
            bit = _decide(bit, 4 * bits + coded, size_contexts, model, coder, stream_P, decodes)
        else:
            bit = _code_bit(bit, 1 << PROBABILITY_BITS - 1, coder, stream_P, decodes)
        coded = 2 * coded + bit
    return -coded if is_negative else coded


@jit_helper
def _decide(
    bit: int, decision: int, contexts_C: Ints, model: _Model, coder: Ints, stream_P: Bytes, decodes: bool
) -> int:
    """Code a bit with the mixed probability of its contexts, and learn from it."""
    mixed_logit = 0
    for c in range(_CONTEXTS):
        probability = model.probabilities[contexts_C[c], decision]
        model.logits[c] = LOGITS[probability >> STATE_BITS - LOGIT_TABLE_BITS]
        mixed_logit += model.weights[decision, c] * model.logits[c]
    mixed_logit = min(max(mixed_logit >> _WEIGHT_BITS, -LARGEST_LOGIT), LARGEST_LOGIT)
    mixed = PROBABILITIES[mixed_logit + LARGEST_LOGIT]
    bit = _code_bit(bit, mixed, coder, stream_P, decodes)
    error = (bit << PROBABILITY_BITS) - mixed
    for c in range(_CONTEXTS):
        model.weights[decision, c] += error * model.logits[c] >> _WEIGHT_SHIFT
        place = contexts_C[c], decision
        probability, count = model.probabilities[place], model.counts[place]
        model.probabilities[place] = probability + (((bit << STATE_BITS) - probability) * RATES[count] >> RATE_BITS)
        model.counts[place] = min(count + 1, LARGEST_COUNT)
    return bit


@jit_helper
def _code_bit(bit: int, probability: int, coder: Ints, stream_P: Bytes, decodes: bool) -> int:
    """The range coder: a 1 keeps the lower part of the interval, a share of it that equals the probability."""
    low, width = coder[_LOW], coder[_HIGH] - coder[_LOW]
    rest = (width & (1 << PROBABILITY_BITS) - 1) * probability >> PROBABILITY_BITS
    middle = low + (width >> PROBABILITY_BITS) * probability + rest
    if decodes:
        bit = int(coder[_CODE] <= middle)
    if bit:
        coder[_HIGH] = middle
    else:
        coder[_LOW] = middle + 1
    while (coder[_LOW] ^ coder[_HIGH]) >> _RANGE_BITS - 8 == 0:  # the first byte is known
        if decodes:
            _read_byte(coder, stream_P)
        else:
            stream_P[coder[_PLACE]] = coder[_LOW] >> _RANGE_BITS - 8
            coder[_PLACE] += 1
        coder[_LOW] = coder[_LOW] << 8 & (1 << _RANGE_BITS) - 1
        coder[_HIGH] = coder[_HIGH] << 8 & (1 << _RANGE_BITS) - 1 | 255
    return bit


@jit_helper
def _read_byte(coder: Ints, stream_P: Bytes) -> None:
    """The next byte of the stream, 0 after its end."""
    byte = np.int64(stream_P[coder[_PLACE]]) if coder[_PLACE] < len(stream_P) else 0
    coder[_CODE] = (coder[_CODE] << 8 & (1 << _RANGE_BITS) - 1) | byte
    coder[_PLACE] += 1


@jit_helper
def _finish(coder: Ints, stream_P: Bytes, decodes: bool) -> int:
    """Write the fewest bytes that end in the interval, zeros being read after them; returns the stream's length."""
    count = 0
    while (coder[_HIGH] >> _RANGE_BITS - 8 * count) << _RANGE_BITS - 8 * count < coder[_LOW]:
        count += 1
    if decodes:
        return int(coder[_PLACE]) - _RANGE_BITS // 8 + count
    for byte in range(count):
        stream_P[coder[_PLACE]] = coder[_HIGH] >> _RANGE_BITS - 8 * (byte + 1) & 255
        coder[_PLACE] += 1
    return int(coder[_PLACE])
