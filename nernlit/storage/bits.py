"""Numbers of a fixed number of bits, most significant bit first.

Shapes: n numbers, W bits of each.
"""

import numpy as np
from numpy.typing import NDArray


def to_bits(values_n: NDArray[np.integer], width: int) -> NDArray[np.uint8]:
    """The bits of numbers from 0 to 2^W - 1, as an array of n * W zeros and ones.

    Args:
        values_n: The numbers.
        width: W, at most 32.

    >>> to_bits(np.array([1, 6]), 3).tolist()
    [0, 0, 1, 1, 1, 0]
    """
    size = _bytes(width)
    as_bytes = values_n.reshape(-1, 1).astype(f">u{size}").view(np.uint8)
    return np.unpackbits(as_bytes, axis=1)[:, 8 * size - width :].reshape(-1)


def from_bits(bits: NDArray[np.uint8], width: int, count: int) -> NDArray[np.int64]:
    """The `count` numbers of W bits each that `to_bits` converted.

    >>> from_bits(np.array([0, 0, 1, 1, 1, 0], dtype=np.uint8), 3, 2).tolist()
    [1, 6]
    """
    size = _bytes(width)
    padded = np.zeros((count, 8 * size), dtype=np.uint8)
    padded[:, 8 * size - width :] = bits.reshape(count, width)
    return np.packbits(padded, axis=1).view(f">u{size}").reshape(-1).astype(np.int64)


def _bytes(width: int) -> int:
    """Bytes of the integers that numbers of W bits are converted through; every bit takes a byte meanwhile."""
    return 2 if width <= 16 else 4
