"""Entropy-coded orders, for .nern files: log2(M!) bits per permutation of M items, the minimum.

A permutation is stored as the swaps of the Fisher-Yates shuffle that creates it from 0, 1, ..., M - 1: step i swaps
item i with one of the M - i items from i on. All distances are equally likely; a range coder stores them.

Shapes: N kernels, C permutations of M items each, P bytes.
"""

import math

import numpy as np
import torch
from torch import Tensor

from nernlit.errors import LayoutError
from nernlit.kernels.layout import Layout
from nernlit.kernels.orders import OrderName
from nernlit.kernels.permutations import Permutations, addresses_of, permutation_shapes, permutations
from nernlit.storage.entropy import LARGEST_UNIFORM, decode_uniform, encode_uniform


def coded_bits(layout: Layout, order: OrderName) -> float:
    """Bits of a layout's coded order, which takes some bytes more: up to 8, or 0.1% for layers of 200,000 kernels."""
    return sum(count * math.lgamma(items + 1) / math.log(2) for count, items in permutation_shapes(layout, order))


def encode_order(layout: Layout, addresses_N3: Tensor, order: OrderName) -> Tensor:
    """The coded order of addresses (N, 3): (P,) uint8.

    Raises:
        LayoutError: If a permutation has too many items.

    >>> layout = Layout([("w", (4, 2, 3, 3))])
    >>> addresses_N3 = torch.tensor([[0, f, c] for f in (1, 0, 3, 2) for c in (1, 0)])
    >>> coded_P = encode_order(layout, addresses_N3, "in_filter")
    >>> torch.equal(decode_order(layout, coded_P, "in_filter"), addresses_N3)
    True
    """
    distances = [_distances(group) for group in permutations(layout, addresses_N3, order)]
    return encode_uniform(torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *distances])), _sizes(layout, order))


def decode_order(layout: Layout, coded_P: Tensor, order: OrderName) -> Tensor:
    """The addresses (N, 3) int64 that `encode_order` coded.

    Raises:
        FileFormatError: If the bytes are not those of an order of the layout.
        LayoutError: If there are far more or fewer bytes than the layout needs, or a permutation has too many items.
    """
    needed = coded_bits(layout, order) / 8
    if not needed / 2 - 8 <= len(coded_P) <= 2 * needed + 8:  # so that time and memory are bounded by the bytes
        raise LayoutError(
            f"the coded order has {len(coded_P)} bytes; expected about {needed:.0f} for {layout.num_kernels} kernels "
            f"in {order} order."
        )
    groups, start = [], 0
    distances = decode_uniform(coded_P, _sizes(layout, order)).numpy()
    for count, items in permutation_shapes(layout, order):
        end = start + count * (items - 1)
        groups.append(_permutations_of_swaps(distances[start:end].reshape(count, items - 1)))
        start = end
    return addresses_of(layout, groups, order)


def _sizes(layout: Layout, order: OrderName) -> Tensor:
    """How many distances are possible at each step."""
    steps = [torch.zeros(0, dtype=torch.int64)]
    for count, items in permutation_shapes(layout, order):
        if items > LARGEST_UNIFORM:
            raise LayoutError(f"an order of {items:,} items cannot be stored; use order none.")
        steps.append(torch.arange(items, 1, -1).repeat(count))
    return torch.cat(steps)


def _distances(group_CM: Permutations) -> Permutations:
    """The distances of the swaps that make permutations, one permutation after the other: (C * (M - 1),)."""
    count, items = group_CM.shape
    distances = np.zeros((count, items - 1), dtype=np.int64)
    for row, permutation in enumerate(group_CM):
        current, place, swaps = list(range(items)), list(range(items)), []
        for step, wanted in enumerate(permutation[:-1].tolist()):
            other, moved = place[wanted], current[step]
            swaps.append(other - step)
            current[other], place[moved] = moved, other
        distances[row] = swaps
    return distances.reshape(-1)


def _permutations_of_swaps(distances: Permutations) -> Permutations:
    """The permutations (C, M) that swaps (C, M - 1) make."""
    count, items = distances.shape[0], distances.shape[1] + 1
    group_CM = np.zeros((count, items), dtype=np.int64)
    for row, swaps in enumerate(distances):
        current = list(range(items))
        for step, distance in enumerate(swaps.tolist()):
            other = step + distance
            current[step], current[other] = current[other], current[step]
        group_CM[row] = current
    return group_CM
