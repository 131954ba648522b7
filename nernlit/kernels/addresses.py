"""Addresses: the (layer, filter, channel) that the predictor is asked for, one row a kernel of the table.

The original's weights never move. An order only changes which (filter, channel) a kernel is *called*: its position in
the order instead of its index, so that neighbouring addresses hold similar kernels.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from nernlit.kernels.layout import Layout
from nernlit.kernels.orders import OrderName, positions


def addresses(layout: Layout, state: Mapping[str, Tensor], order: OrderName) -> Tensor:
    """The address of every kernel, (N, 3) int64: layer number, filter position, channel position.

    Args:
        layout: Which kernels, and in which rows.
        state: The original's state dict; an order is read off its weights.
        order: `none` (raw indices), `in_filter` or `cross_filter`.

    >>> layout = Layout([("w", (2, 2, 1, 1))])
    >>> addresses(layout, {"w": torch.ones(2, 2, 1, 1)}, "none").tolist()
    [[0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 1]]
    """
    rows = []
    for number, layer in enumerate(layout.layers):
        places_OI2 = positions(state[layer.key].detach().cpu(), order)
        rows.append(torch.cat([torch.full((layer.kernels, 1), number), places_OI2.view(-1, 2)], dim=1))
    return torch.cat(rows)
