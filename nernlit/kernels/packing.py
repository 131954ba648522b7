"""Packed orders: addresses as the bits that a decoder needs to restore them, and back.

A permutation of M items is stored as M numbers of ceil(log2 M) bits, most significant bit first. An in-filter order has
one permutation of each layer's filters and one of each filter's channels; a cross-filter order has one of all kernels
of each layer. Layers are stored without gaps; the last byte is padded with zeros.

Shapes: N kernels, O filters, I channels, M items of a permutation, P bytes.
"""

import math
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nernlit.errors import LayoutError
from nernlit.kernels.layout import Layout
from nernlit.kernels.orders import OrderName


def packed_bits(layout: Layout, order: OrderName) -> int:
    """Bits of a layout's packed order."""
    return sum(count * items * _width(items) for count, items in _permutations(layout, order))


def pack_order(layout: Layout, addresses_N3: Tensor, order: OrderName) -> Tensor:
    """The packed order of addresses (N, 3): (P,) uint8 with P = ceil(packed_bits / 8).

    >>> layout = Layout([("w", (4, 2, 3, 3))])
    >>> addresses_N3 = torch.tensor([[0, f, c] for f in (1, 0, 3, 2) for c in (1, 0)])
    >>> [f"{byte:08b}" for byte in pack_order(layout, addresses_N3, "in_filter")]
    ['01001110', '10101010']
    """
    parts = [np.zeros(0, dtype=np.uint8)]
    for layer in layout.layers:
        filters, channels = layer.grid
        places = addresses_N3[layer.rows, 1:].cpu().numpy().reshape(filters, channels, 2)
        if order == "in_filter":
            parts += [_to_bits(places[:, 0, 0], filters), _to_bits(places[:, :, 1], channels)]
        elif order == "cross_filter":
            parts.append(_to_bits(places[:, :, 0] * channels + places[:, :, 1], filters * channels))
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
    bits, start = np.unpackbits(packed_P.numpy()), 0

    def permutations(count: int, items: int) -> NDArray[np.int64]:
        nonlocal start
        end = start + count * items * _width(items)
        values = _from_bits(bits[start:end], items, count * items).reshape(count, items)
        start = end
        if not (np.sort(values, axis=1) == np.arange(items)).all():
            raise LayoutError(f"the packed order is damaged: expected a permutation of {items} items.")
        return values

    tables = []
    for number, layer in enumerate(layout.layers):
        filters, channels = layer.grid
        if order == "in_filter":
            at_filter = permutations(1, filters).reshape(filters, 1).repeat(channels, axis=1)
            at_channel = permutations(filters, channels)
        else:
            count = filters * channels
            flat = permutations(1, count) if order == "cross_filter" else np.arange(count)
            at_filter, at_channel = np.divmod(flat.reshape(filters, channels), channels)
        table = np.stack([np.full_like(at_filter, number), at_filter, at_channel], axis=-1)
        tables.append(torch.from_numpy(table.reshape(-1, 3)))
    return torch.cat(tables)


def _permutations(layout: Layout, order: OrderName) -> Iterator[tuple[int, int]]:
    """(number of permutations, items in each) of every group of permutations of an order."""
    for layer in layout.layers:
        filters, channels = layer.grid
        if order == "in_filter":
            yield from ((1, filters), (filters, channels))
        elif order == "cross_filter":
            yield 1, filters * channels


def _width(items: int) -> int:
    """Bits of a number below `items`."""
    return math.ceil(math.log2(items)) if items > 1 else 0


def _to_bits(values: NDArray[np.int64], items: int) -> NDArray[np.uint8]:
    """The bits of numbers below `items`, flattened into one array of zeros and ones."""
    width = _width(items)
    as_bytes = values.reshape(-1, 1).astype(">u4").view(np.uint8)
    return np.unpackbits(as_bytes, axis=1)[:, 32 - width :].reshape(-1)


def _from_bits(bits: NDArray[np.uint8], items: int, count: int) -> NDArray[np.int64]:
    """The inverse of `_to_bits`: `count` numbers below `items`."""
    width = _width(items)
    padded = np.zeros((count, 32), dtype=np.uint8)
    padded[:, 32 - width :] = bits.reshape(count, width)
    return np.packbits(padded, axis=1).view(">u4").reshape(-1).astype(np.int64)
