"""Slow and plain versions of k-means and additive quantization: a block at a time, a codeword at a time."""

from collections.abc import Sequence
from math import log2

import numpy as np


def error(block: np.ndarray, weight: np.ndarray, predicted: np.ndarray) -> float:
    return float(sum(w * (x - y) ** 2 for x, y, w in zip(block, predicted, weight, strict=True)))


def code_costs(codes: Sequence[int], codewords: int, cost_per_bit: float) -> list[float]:
    """The price of the bits of each code, if each had occurred half a time more."""
    total = len(codes) + codewords / 2
    return [cost_per_bit * log2(total / (list(codes).count(code) + 0.5)) for code in range(codewords)]


def nearest(
    blocks: np.ndarray, weights: np.ndarray, codewords: np.ndarray, code_costs: Sequence[float] | None = None
) -> list[int]:
    paid = code_costs or [0.0] * len(codewords)
    return [
        min(range(len(codewords)), key=lambda code: error(block, weight, codewords[code]) + paid[code])
        for block, weight in zip(blocks, weights, strict=True)
    ]


def means(blocks: np.ndarray, weights: np.ndarray, codes: list[int], codewords: np.ndarray) -> np.ndarray:
    moved = codewords.copy()
    for code in range(len(codewords)):
        own = [number for number, given in enumerate(codes) if given == code]
        for d in range(blocks.shape[1]):
            total = sum(weights[number, d] for number in own)
            if total > 0:
                moved[code, d] = sum(weights[number, d] * blocks[number, d] for number in own) / total
    return moved


def sweep(
    blocks: np.ndarray, weights: np.ndarray, codebooks: np.ndarray, codes: np.ndarray, cost_per_bit: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Iterated conditional modes: each codebook in turn, on what the others leave."""
    codebooks, codes = codebooks.copy(), codes.copy()
    for book in range(len(codebooks)):
        others = [m for m in range(len(codebooks)) if m != book]
        left = np.array([b - sum(codebooks[m][codes[m, n]] for m in others) for n, b in enumerate(blocks)])
        paid = code_costs(codes[book].tolist(), len(codebooks[book]), cost_per_bit)
        codes[book] = nearest(left, weights, codebooks[book], paid)
        codebooks[book] = means(left, weights, list(codes[book]), codebooks[book])
    return codebooks, codes


def cost(
    block: np.ndarray,
    weight: np.ndarray,
    codebooks: np.ndarray,
    codes: Sequence[int],
    code_costs: Sequence[Sequence[float]],
) -> float:
    """The error and the costs of some codes, of the first codebooks."""
    predicted = sum(codebooks[m][code] for m, code in enumerate(codes))
    return error(block, weight, predicted) + sum(code_costs[m][code] for m, code in enumerate(codes))


def beam_search(
    block: np.ndarray, weight: np.ndarray, codebooks: np.ndarray, width: int, code_costs: Sequence[Sequence[float]]
) -> tuple[int, ...]:
    kept: list[tuple[int, ...]] = [()]
    for book in range(len(codebooks)):
        longer = [(*codes, code) for codes in kept for code in range(len(codebooks[book]))]
        kept = sorted(longer, key=lambda codes: cost(block, weight, codebooks, codes, code_costs))[:width]
    return kept[0]
