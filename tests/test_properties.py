"""Property-based tests: layouts, orders, codes and coded integers are restored exactly."""

import math
from collections.abc import Sequence
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from nernlit.errors import FileFormatError
from nernlit.kernels import Layout, addresses, decode_order, encode_order
from nernlit.kernels.addresses import are_addresses
from nernlit.kernels.orders import OrderName, positions
from nernlit.kernels.packing import pack_order, unpack_order
from nernlit.predictors.codes import decode_codes, encode_codes, pack_codes, packed_bytes, unpack_codes
from nernlit.storage.entropy import (
    LARGEST_UNIFORM,
    LARGEST_WEIGHT,
    decode,
    decode_uniform,
    decode_weights,
    encode,
    encode_uniform,
    encode_weights,
)

#: The same examples in every run; a failing one is printed.
properties = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])

SIDES = st.integers(1, 5)
COUNTS = st.integers(1, 7)
ORDERS = st.sampled_from(get_args(OrderName))
KERNELS = st.tuples(COUNTS, COUNTS, SIDES, SIDES)


@st.composite
def networks(draw: st.DrawFn, shapes: st.SearchStrategy[Any] = KERNELS) -> dict[str, Tensor]:
    """Weights of one to four layers: any finite numbers, repeated ones among them."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    values = draw(st.sampled_from(["normal", "few", "equal"]))
    weights = {}
    for number, shape in enumerate(draw(st.lists(shapes, min_size=1, max_size=4))):
        weight = torch.randn(shape, generator=generator)
        weights[f"layer{number}.weight"] = {"normal": weight, "few": weight.sign(), "equal": weight * 0 + 1}[values]
    return weights


def _layout(weights: dict[str, Tensor], **options: Any) -> Layout:
    return Layout([(name, tuple(weight.shape)) for name, weight in weights.items()], {}, **options)


@properties
@given(networks(), st.integers(0, 3))
def test_weights_come_back_out_of_their_blocks(weights: dict[str, Tensor], larger: int) -> None:
    layout = _layout(weights)
    block = tuple(side + larger for side in layout.block)
    for table in (layout.table(weights), layout.table(weights, block)):
        back = layout.weights(table)
        assert back.keys() == weights.keys()
        assert all(torch.equal(back[name], weight) for name, weight in weights.items())
    assert layout.num_weights == sum(weight.numel() for weight in weights.values())


@properties
@given(networks(st.tuples(st.integers(1, 20), st.integers(1, 20))), SIDES)
def test_linear_weights_come_back_out_of_their_tiles(weights: dict[str, Tensor], tile: int) -> None:
    layout = _layout(weights, tile=tile)
    back = layout.weights(layout.table(weights))
    assert all(torch.equal(back[name], weight) for name, weight in weights.items())


@properties
@given(networks(), ORDERS)
def test_an_order_is_a_permutation_that_comes_back_packed_and_coded(
    weights: dict[str, Tensor], order: OrderName
) -> None:
    layout = _layout(weights)
    for weight in weights.values():
        places_N2 = positions(weight, order).flatten(0, 1)
        assert sorted(map(tuple, places_N2.tolist())) == [
            (f, c) for f in range(len(weight)) for c in range(weight.shape[1])
        ]
    addresses_N3 = addresses(layout, weights, order)
    assert are_addresses(layout, addresses_N3)
    assert torch.equal(unpack_order(layout, pack_order(layout, addresses_N3, order), order), addresses_N3)
    assert torch.equal(decode_order(layout, encode_order(layout, addresses_N3, order), order), addresses_N3)


@properties
@given(st.data(), st.integers(1, 16), st.lists(st.integers(0, 30), min_size=1, max_size=4), st.integers(1, 3))
def test_codes_come_back_packed_and_coded(data: st.DataObject, bits: int, kernels: Sequence[int], books: int) -> None:
    count = sum(kernels) * books
    codes = data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=count, max_size=count))
    codes_NM = torch.tensor(codes, dtype=torch.int32).reshape(-1, books)
    packed_P = pack_codes(codes_NM, bits)
    assert len(packed_P) == packed_bytes(count, bits)
    assert torch.equal(unpack_codes(packed_P, bits, len(codes_NM), books), codes_NM)
    assert torch.equal(decode_codes(encode_codes(codes_NM, kernels), kernels, books, bits), codes_NM)


@st.composite
def groups_of_integers(draw: st.DrawFn) -> list[list[int]]:
    """Groups of integers that are small, of 64 bits, or both."""
    widest = draw(st.sampled_from([1, 8, 2**15, 2**40, 2**63]))
    integers = st.integers(-widest, widest - 1) | st.integers(-2, 2)
    return draw(st.lists(st.lists(integers, max_size=60), max_size=5))


@properties
@given(groups_of_integers())
def test_coded_integers_come_back(groups: list[list[int]]) -> None:
    integers_N = torch.tensor([value for group in groups for value in group], dtype=torch.int64)
    sizes = [len(group) for group in groups]
    assert torch.equal(decode(encode(integers_N, sizes), sizes), integers_N)


@properties
@given(st.lists(st.tuples(st.integers(2, LARGEST_UNIFORM), st.floats(0, 1, exclude_max=True)), max_size=50))
def test_integers_below_their_sizes_come_back(pairs: list[tuple[int, float]]) -> None:
    sizes_N = torch.tensor([size for size, _ in pairs], dtype=torch.int64)
    integers_N = torch.tensor([int(size * share) for size, share in pairs], dtype=torch.int64)
    assert torch.equal(decode_uniform(encode_uniform(integers_N, sizes_N), sizes_N), integers_N)


@properties
@given(
    st.data(),
    st.lists(st.tuples(*[st.integers(0, 4)] * 2, SIDES, SIDES), max_size=3),
    st.sampled_from([1, 9, LARGEST_WEIGHT]),
)
def test_coded_weights_come_back(data: st.DataObject, parts: list[tuple[int, ...]], largest: int) -> None:
    count = sum(map(math.prod, parts))
    integers = data.draw(st.lists(st.integers(-largest, largest), min_size=count, max_size=count))
    integers_N = torch.tensor(integers, dtype=torch.int64)
    assert torch.equal(decode_weights(encode_weights(integers_N, parts), parts), integers_N)  # type: ignore[arg-type]


@properties
@given(st.binary(max_size=200), st.lists(st.integers(0, 50), max_size=4))
def test_any_bytes_are_integers_or_one_error(content: bytes, groups: list[int]) -> None:
    packed_P = torch.from_numpy(np.frombuffer(content, dtype=np.uint8).copy())
    try:
        assert len(decode(packed_P, groups)) == sum(groups)
    except FileFormatError as error:
        assert str(error)  # noqa: PT017  # most bytes are none


def test_an_empty_file_holds_no_integers() -> None:
    assert decode(encode(torch.zeros(0, dtype=torch.int64), []), []).tolist() == []
    with pytest.raises(FileFormatError, match="expected bytes, a multiple of 4"):
        decode(torch.zeros(3, dtype=torch.uint8), [1])
