"""Bit-packed orders, for checkpoints.

A permutation of M items is stored as M integers of ceil(log2 M) bits, most significant bit first. Permutations follow
each other without padding; the last byte is padded with zeros. .nern files use a shorter code; see `coded_order`.

Shapes: N kernels, M items of a permutation, P bytes.
"""

import math

import numpy as np
import torch
from torch import Tensor

from nernlit.errors import LayoutError
from nernlit.kernels.layout import Layout
from nernlit.kernels.orders import OrderName
from nernlit.kernels.permutations import addresses_of, permutation_shapes, permutations
from nernlit.storage.bits import from_bits, to_bits


def packed_bits(layout: Layout, order: OrderName) -> int:
    """Bits of a layout's packed order."""
    return sum(count * items * _width(items) for count, items in permutation_shapes(layout, order))


def pack_order(layout: Layout, addresses_N3: Tensor, order: OrderName) -> Tensor:
    """The packed order of addresses (N, 3): (P,) uint8 with P = ceil(packed_bits / 8).

    >>> layout = Layout([("w", (4, 2, 3, 3))])
    >>> addresses_N3 = torch.tensor([[0, f, c] for f in (1, 0, 3, 2) for c in (1, 0)])
    >>> [f"{byte:08b}" for byte in pack_order(layout, addresses_N3, "in_filter")]
    ['01001110', '10101010']
    """
    groups = permutations(layout, addresses_N3, order)
    parts = [np.zeros(0, dtype=np.uint8), *(to_bits(group, _width(group.shape[1])) for group in groups)]
    return torch.from_numpy(np.packbits(np.concatenate(parts)))


def unpack_order(layout: Layout, packed_P: Tensor, order: OrderName) -> Tensor:
    """The addresses (N, 3) int64 that `pack_order` packed.

    Raises:
        LayoutError: If there are more or fewer bytes than the layout needs, or the numbers are not permutations.
    """
    needed = (packed_bits(layout, order) + 7) // 8
    if packed_P.dtype != torch.uint8 or packed_P.shape != (needed,):
        raise LayoutError(
            f"the packed order is {packed_P.dtype} of shape {tuple(packed_P.shape)}; expected uint8 of shape "
            f"({needed},) for {layout.num_kernels} kernels in {order} order."
        )
    bits, start, groups = np.unpackbits(packed_P.numpy()), 0, []
    for count, items in permutation_shapes(layout, order):
        width = _width(items)
        end = start + count * items * width
        group = from_bits(bits[start:end], width, count * items).reshape(count, items)
        if not (np.sort(group, axis=1) == np.arange(items)).all():
            raise LayoutError(f"the packed order is damaged: expected a permutation of {items} items.")
        groups.append(group)
        start = end
    return addresses_of(layout, groups, order)


def _width(items: int) -> int:
    """Bits of a number below `items`."""
    return math.ceil(math.log2(items)) if items > 1 else 0
