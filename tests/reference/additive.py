"""Slow and plain versions of k-means and additive quantization: a block at a time, a codeword at a time."""

import numpy as np


def error(block: np.ndarray, weight: np.ndarray, predicted: np.ndarray) -> float:
    return float(sum(w * (x - y) ** 2 for x, y, w in zip(block, predicted, weight, strict=True)))


def nearest(blocks: np.ndarray, weights: np.ndarray, codewords: np.ndarray) -> list[int]:
    return [
        min(range(len(codewords)), key=lambda code: error(block, weight, codewords[code]))
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
    blocks: np.ndarray, weights: np.ndarray, codebooks: np.ndarray, codes: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Iterated conditional modes: each codebook in turn, on what the others leave."""
    codebooks, codes = codebooks.copy(), codes.copy()
    for book in range(len(codebooks)):
        others = [m for m in range(len(codebooks)) if m != book]
        left = np.array([b - sum(codebooks[m][codes[m, n]] for m in others) for n, b in enumerate(blocks)])
        codes[book] = nearest(left, weights, codebooks[book])
        codebooks[book] = means(left, weights, list(codes[book]), codebooks[book])
    return codebooks, codes


def beam_search(block: np.ndarray, weight: np.ndarray, codebooks: np.ndarray, width: int) -> tuple[int, ...]:
    kept: list[tuple[int, ...]] = [()]
    for book in range(len(codebooks)):
        longer = [(*codes, code) for codes in kept for code in range(len(codebooks[book]))]
        kept = sorted(
            longer,
            key=lambda codes: error(block, weight, sum(codebooks[m][code] for m, code in enumerate(codes))),
        )[:width]
    return kept[0]
