from typing import get_args

import pytest
import torch
from torch import Tensor

from nernlit.errors import LayoutError
from nernlit.kernels import Layout, addresses
from nernlit.kernels.orders import OrderName
from nernlit.kernels.packing import pack_order, packed_bits, unpack_order

ORDERS = get_args(OrderName)
#: One filter, one channel, powers of two, numbers beside them, and a layer of one kernel.
LAYERS = [
    ("one", (1, 1, 3, 3)),
    ("filter", (1, 5, 3, 3)),
    ("channel", (7, 1, 3, 3)),
    ("power", (8, 16, 1, 1)),
    ("odd", (9, 17, 3, 3)),
]


def case(order: OrderName) -> tuple[Layout, Tensor]:
    layout = Layout(LAYERS)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    state = {key: torch.randn(shape, generator=generator) for key, shape in LAYERS}
    return layout, addresses(layout, state, order)


def _slow(layout: Layout, table: Tensor, order: OrderName) -> str:
    """The bits of an order, written down one number at a time."""

    def written(number: int, items: int) -> str:
        width = (items - 1).bit_length()
        return format(number, f"0{width}b") if width else ""

    text = ""
    for layer in layout.layers:
        filters, channels = layer.shape[:2]
        rows = table[layer.rows].tolist()
        if order == "in_filter":
            text += "".join(written(rows[f * channels][1], filters) for f in range(filters))
            text += "".join(written(row[2], channels) for row in rows)
        elif order == "cross_filter":
            text += "".join(written(row[1] * channels + row[2], filters * channels) for row in rows)
    return text


@pytest.mark.parametrize("order", ORDERS)
def test_a_packed_order_comes_back_as_it_was(order: OrderName) -> None:
    layout, table = case(order)
    packed = pack_order(layout, table, order)
    assert torch.equal(unpack_order(layout, packed, order), table)


@pytest.mark.parametrize("order", ORDERS)
def test_packed_bits_are_those_of_the_slow_way_and_as_many_as_counted(order: OrderName) -> None:
    layout, table = case(order)
    text = _slow(layout, table, order)
    assert len(text) == packed_bits(layout, order)
    packed = pack_order(layout, table, order)
    assert "".join(f"{byte:08b}" for byte in packed.tolist())[: len(text)] == text
    assert len(packed) == (len(text) + 7) // 8


def test_bytes_that_hold_no_order_are_refused() -> None:
    layout, table = case("in_filter")
    packed = pack_order(layout, table, "in_filter")
    with pytest.raises(LayoutError, match=r"expected uint8 of shape \(\d+,\) for 294 kernels in in_filter order"):
        unpack_order(layout, packed[:-1], "in_filter")
    with pytest.raises(LayoutError, match="expected uint8"):
        unpack_order(layout, packed.int(), "in_filter")
    with pytest.raises(LayoutError, match="the packed order is damaged: expected a permutation of 5 items"):
        unpack_order(layout, torch.zeros_like(packed), "in_filter")
