"""Coded orders: log2(M!) bits for each permutation."""

import itertools
import math
from typing import get_args

import pytest
import torch

from nernlit.errors import FileFormatError, LayoutError
from nernlit.kernels import Layout, OrderName, coded_bits, decode_order, encode_order, packed_bits
from nernlit.originals import Original
from tests.kernels.test_packing import case


@pytest.mark.parametrize("order", get_args(OrderName))
def test_a_coded_order_comes_back_in_as_few_bits_as_there_are_orders(order: OrderName) -> None:
    layout, table = case(order)
    coded = encode_order(layout, table, order)
    assert torch.equal(decode_order(layout, coded, order), table)
    assert 0 <= len(coded) - coded_bits(layout, order) / 8 <= 8


def test_every_permutation_has_its_own_code() -> None:
    layout = Layout([("w", (4, 1, 3, 3))])
    codes = set()
    for filters in itertools.permutations(range(4)):
        table = torch.tensor([[0, filter_, 0] for filter_ in filters])
        coded = encode_order(layout, table, "in_filter")
        assert torch.equal(decode_order(layout, coded, "in_filter"), table)
        codes.add(bytes(coded.tolist()))
    assert len(codes) == math.factorial(4)


def test_coded_orders_of_resnet20_take_three_quarters_of_the_packed_ones() -> None:
    layout = Layout.from_module(Original("cifar_resnet20").net)
    assert coded_bits(layout, "in_filter") < 0.76 * packed_bits(layout, "in_filter")
    assert coded_bits(layout, "cross_filter") < 0.9 * packed_bits(layout, "cross_filter")
    assert coded_bits(layout, "none") == 0


def test_bytes_that_hold_no_order_are_refused() -> None:
    layout, table = case("in_filter")
    coded = encode_order(layout, table, "in_filter")
    with pytest.raises(LayoutError, match=r"the coded order has 12 bytes; expected about \d+ for 294 kernels"):
        decode_order(layout, coded[:12], "in_filter")
    with pytest.raises(FileFormatError, match="expected bytes, a multiple of 4"):
        decode_order(layout, coded.int(), "in_filter")
    with pytest.raises(FileFormatError, match="more bytes than integers"):
        decode_order(layout, torch.cat([coded, coded[:16]]), "in_filter")
    with pytest.raises(LayoutError, match="an order of 25,000,000 items cannot be stored; use order none"):
        decode_order(Layout([("w", (5000, 5000, 1, 1))]), torch.zeros(70_000_000, dtype=torch.uint8), "cross_filter")
