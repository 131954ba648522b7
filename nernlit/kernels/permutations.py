"""Orders as permutations: what has to be stored of the addresses of a layout.

An in-filter order has one permutation of each layer's filters and one of each filter's channels; a cross-filter order
has one of all kernels of each layer; the order `none` has none.

Shapes: N kernels, O filters, I channels, C permutations of M items each.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nernlit.kernels.layout import Layout
from nernlit.kernels.orders import OrderName

Permutations = NDArray[np.int64]


def permutation_shapes(layout: Layout, order: OrderName) -> Iterator[tuple[int, int]]:
    """(C, M) of every group of permutations of an order, in the order in which they are stored."""
    for layer in layout.layers:
        filters, channels = layer.grid
        if order == "in_filter":
            yield from ((1, filters), (filters, channels))
        elif order == "cross_filter":
            yield 1, filters * channels


def permutations(layout: Layout, addresses_N3: Tensor, order: OrderName) -> Iterator[Permutations]:
    """The permutations (C, M) of addresses; see `permutation_shapes`."""
    for layer in layout.layers:
        filters, channels = layer.grid
        places = addresses_N3[layer.rows, 1:].cpu().long().numpy().reshape(filters, channels, 2)
        if order == "in_filter":
            yield from (places[None, :, 0, 0], places[:, :, 1])
        elif order == "cross_filter":
            yield (places[:, :, 0] * channels + places[:, :, 1]).reshape(1, -1)


def addresses_of(layout: Layout, groups: Sequence[Permutations], order: OrderName) -> Tensor:
    """The addresses (N, 3) int64 of permutations; the inverse of `permutations`."""
    tables, stored = [], iter(groups)
    for number, layer in enumerate(layout.layers):
        filters, channels = layer.grid
        if order == "in_filter":
            at_filter, at_channel = next(stored).reshape(filters, 1).repeat(channels, axis=1), next(stored)
        else:
            flat = next(stored) if order == "cross_filter" else np.arange(filters * channels)
            at_filter, at_channel = np.divmod(flat.reshape(filters, channels), channels)
        table = np.stack([np.full_like(at_filter, number), at_filter, at_channel], axis=-1)
        tables.append(torch.from_numpy(table.reshape(-1, 3)))
    return torch.cat(tables)
