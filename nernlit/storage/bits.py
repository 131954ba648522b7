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
    as_bytes = values_n.reshape(-1, 1).astype(">u4").view(np.uint8)
    return np.unpackbits(as_bytes, axis=1)[:, 32 - width :].reshape(-1)


def from_bits(bits: NDArray[np.uint8], width: int, count: int) -> NDArray[np.int64]:
    """The `count` numbers of W bits each that `to_bits` converted.

    >>> from_bits(np.array([0, 0, 1, 1, 1, 0], dtype=np.uint8), 3, 2).tolist()
    [1, 6]
    """
    padded = np.zeros((count, 32), dtype=np.uint8)
    padded[:, 32 - width :] = bits.reshape(count, width)
    return np.packbits(padded, axis=1).view(">u4").reshape(-1).astype(np.int64)
