"""A slow decoder of adaptively coded weights, written from the description of the format, with dictionaries.

A decision is a tuple: ("more", k) whether a magnitude has more than k bits, "sign", or ("bit", k, bits before it).
"""

from collections.abc import Sequence
from decimal import Decimal, getcontext
from functools import cache
from itertools import product
from typing import Any

getcontext().prec = 40
Decision = Any
PROBABILITY = [
    min(max(int(65536 / (1 + (Decimal(-logit) / 256).exp()) + Decimal("0.5")), 1), 65535)
    for logit in range(-2816, 2817)
]


@cache
def _logit(probability: int) -> int:
    """The logit, in 256ths, of a probability in units of 2 ** -22, of which 12 bits count."""
    cell = probability >> 10
    if cell < 2048:
        return -_logit((4095 - cell) << 10)
    return next(logit for logit in range(2817) if PROBABILITY[logit + 2816] >= 16 * cell + 8)


def _sign(number: int) -> int:
    return (number > 0) - (number < 0)


class Decoder:
    """Decodes one stream."""

    def __init__(self, stream: bytes) -> None:
        self.stream = stream + bytes(6)
        self.low, self.high = 0, 2**48 - 1
        self.code, self.place = int.from_bytes(self.stream[:6], "big"), 6
        self.states: dict[tuple[Any, Decision], list[int]] = {}  # [probability, count]
        self.weights: dict[Decision, list[int]] = {}
        self.new_rows: dict[Decision, int] = {}
        self.new_columns: dict[Decision, int] = {}

    def numbers(self, parts: Sequence[tuple[int, int, int, int]]) -> list[int]:
        """The numbers of all parts."""
        numbers: list[int] = []
        for rows, columns, height, width in parts:
            self.start_part()
            for row, column in product(range(rows), range(columns)):
                kernel: dict[tuple[int, int], int] = {}
                for y, x in product(range(height), range(width)):
                    sizes, signs = self.contexts(kernel, y, x, [0, 0, *numbers][-2:])
                    lines = ["all", ("row", row % 1024), ("column", column % 1024)]
                    kernel[y, x] = self.number([*lines, *sizes], [*lines, *signs])
                    numbers.append(kernel[y, x])
        return numbers

    def start_part(self) -> None:
        """Rows become columns, new rows are like all numbers, and the rest is less certain."""
        earlier, self.states = self.states, {}
        self.new_columns = self.new_rows
        self.new_rows = {decision: state[0] for (name, decision), state in earlier.items() if name == "all"}
        for (context, decision), (probability, count) in earlier.items():
            if context[0] != "column":
                renamed = ("column", context[1]) if context[0] == "row" else context
                self.states[renamed, decision] = [probability, min(count, 20)]

    def contexts(self, kernel: dict[tuple[int, int], int], y: int, x: int, last: list[int]) -> tuple[Any, Any]:
        """The three contexts of the neighborhood, for the magnitude and for the sign."""

        def at(up: int, left: int) -> int:
            return kernel.get((y - up, x - left), 0)

        near = [at(0, 1), at(1, 0), at(1, 1), at(1, -1)]
        bits = [abs(value).bit_length() for value in near]
        others = sum(value != 0 for value in kernel.values())
        place = 4 * min(y, 3) + min(x, 3)
        slope = 2 * (near[0] + near[1]) + near[2] + near[3]
        sides = 27 * _sign(near[0]) + 9 * _sign(near[1])
        sizes = [
            (3, 81 * place + min(others, 80)),
            (4, 17 * abs(last[1]).bit_length() + abs(last[0]).bit_length()),
            (5, 81 * place + min(2 * (bits[0] + bits[1]) + bits[2] + bits[3], 80)),
        ]
        signs = [
            (3, 81 * place + 40 + sides + 3 * _sign(near[2]) + _sign(near[3])),
            (4, 81 * place + 40 + _sign(slope) * abs(slope).bit_length()),
            (5, 81 * place + 40 + sides + 3 * _sign(at(0, 2)) + _sign(at(2, 0))),
        ]
        return sizes, signs

    def number(self, sizes: list[Any], signs: list[Any]) -> int:
        """One number."""
        length = 0
        while length < 16 and self.decision(("more", length), sizes):
            length += 1
        if length == 0:
            return 0
        is_negative, magnitude = self.decision("sign", signs), 1
        for done in range(1, length):
            adaptive = done < 3
            bit = self.decision(("bit", length, magnitude), sizes) if adaptive else self.bit(32768)
            magnitude = 2 * magnitude + bit
        return -magnitude if is_negative else magnitude

    def decision(self, decision: Decision, contexts: list[Any]) -> int:
        """A bit of mixed probability."""
        states = [self.states.setdefault((context, decision), self.fresh(context, decision)) for context in contexts]
        weights = self.weights.setdefault(decision, [2**24 // 5] * 6)
        logits = [_logit(probability) for probability, _ in states]
        mixed = sum(weight * logit for weight, logit in zip(weights, logits, strict=True)) // 2**24
        probability = PROBABILITY[min(max(mixed, -2816), 2816) + 2816]
        bit = self.bit(probability)
        for number, state in enumerate(states):
            weights[number] += (65536 * bit - probability) * logits[number] // 2**8
            rate = 655360 // (10 * state[1] + 16)
            state[:] = [state[0] + (2**22 * bit - state[0]) * rate // 65536, min(state[1] + 1, 1023)]
        return bit

    def fresh(self, context: Any, decision: Decision) -> list[int]:
        """The state of a context that is new in a part."""
        known = {"row": self.new_rows, "column": self.new_columns}.get(context[0], {})
        return [known.get(decision, 2**21), 0]

    def bit(self, probability: int) -> int:
        """A bit that is 1 with a probability in units of 2 ** -16."""
        middle = self.low + (self.high - self.low) * probability // 65536
        bit = int(self.code <= middle)
        self.low, self.high = (self.low, middle) if bit else (middle + 1, self.high)
        while self.low >> 40 == self.high >> 40:
            self.low, self.high = self.low << 8 & 2**48 - 1, self.high << 8 & 2**48 - 1 | 255
            following = self.stream[self.place] if self.place < len(self.stream) else 0
            self.code, self.place = self.code << 8 & 2**48 - 1 | following, self.place + 1
        return bit
