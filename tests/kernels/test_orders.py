import math
from pathlib import Path
from typing import Any, Literal

import numba
import numpy as np
import pytest
import torch

from nernlit.errors import LayoutError
from nernlit.kernels import Layout, addresses, greedy, greedy_order, packed_bits
from nernlit.kernels.orders import inverse, positions
from nernlit.originals import Original
from tests.reference import slow

SHAPES = [
    (7, 5, 3, 3),
    (6, 9, 1, 1),
    (4, 1, 3, 3),
    (1, 6, 5, 5),
    (3, 8, 1, 3),
    (1, 1, 3, 3),
    (1, 1, 1, 1),
    (4, 1, 1, 1),
]


@pytest.mark.parametrize("shape", SHAPES)
def test_greedy_orders_match_the_quadratic_reference(shape: tuple[int, int, int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    assert np.array_equal(positions(weight, "in_filter").numpy(), slow.in_filter_positions(weight.numpy()))
    assert np.array_equal(positions(weight, "cross_filter").numpy(), slow.cross_filter_positions(weight.numpy()))


def test_an_order_gives_every_kernel_of_a_layer_another_address() -> None:
    weight = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    for order in ("none", "in_filter", "cross_filter"):
        flat = addresses(Layout([("w", weight.shape)]), {"w": weight}, order)  # type: ignore[arg-type, list-item]
        assert sorted(map(tuple, flat.tolist())) == [(0, f, c) for f in range(6) for c in range(4)]


def test_neighbors_in_the_order_are_more_alike_than_before() -> None:
    weight = torch.randn(1, 200, 3, 3, generator=torch.Generator().manual_seed(0))
    order = greedy_order(weight.flatten(2))[0]

    def roughness(kernels: torch.Tensor) -> float:
        return float(1 - torch.cosine_similarity(kernels[1:], kernels[:-1]).mean())

    kernels = weight[0].flatten(1)
    assert roughness(kernels[order]) < 0.5 * roughness(kernels)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("values", ["zero", "constant", "zero kernels", "huge", "tiny"])
def test_degenerate_weights_have_the_orders_of_the_reference(shape: tuple[int, int, int, int], values: str) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    if values in ("zero", "constant"):
        weight.fill_(0.0 if values == "zero" else 0.5)
    elif values == "zero kernels":
        weight.view(-1, *shape[2:])[::2] = 0
    else:
        weight *= 1e30 if values == "huge" else 1e-30
    if values != "zero kernels" or shape[2:] != (1, 1):  # between a number and 0 the reference takes the distance
        assert np.array_equal(positions(weight, "in_filter").numpy(), slow.in_filter_positions(weight.numpy()))
    assert np.array_equal(positions(weight, "cross_filter").numpy(), slow.cross_filter_positions(weight.numpy()))


@pytest.mark.parametrize("order", ["none", "in_filter", "cross_filter"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused_by_name(order: Any, value: float) -> None:
    state = {"a": torch.ones(2, 2, 3, 3), "b": torch.ones(2, 2, 3, 3)}
    state["b"][1, 0, 2, 2] = value
    layout = Layout([(key, (2, 2, 3, 3)) for key in state])
    with pytest.raises(LayoutError, match="1 of the 36 values of the original's 'b' are not finite"):
        addresses(layout, state, order)


def test_equal_similarities_and_zero_kernels_take_the_lower_index() -> None:
    items = torch.zeros(1, 5, 9)
    assert greedy_order(items).tolist() == [[0, 1, 2, 3, 4]]


@pytest.mark.parametrize("similarity", ["cosine", "distance"])
@pytest.mark.parametrize("features", [1, 2, 9])
def test_a_tree_gives_the_walk_of_a_scan(similarity: Literal["cosine", "distance"], features: int) -> None:
    """With more items than are scanned at once; among them zeros and equal ones."""
    items = torch.randn(3_000, features, generator=torch.Generator().manual_seed(features), dtype=torch.float64)
    items[1_000:1_100] = 0
    items[1_100:1_400] = items[:300]
    if similarity == "cosine":
        # Of the same length to the bit, so that equal directions are equal numbers in every order of summation.
        items = items.sign() if features == 1 else items / items.norm(dim=1, keepdim=True).clamp_min(1e-300)
    alive = torch.ones(len(items), dtype=torch.bool)
    expected = [0]
    for _ in range(len(items) - 1):
        alive[expected[-1]] = False
        current = items[expected[-1]]
        score = (items * current).sum(1) if similarity == "cosine" else -(items - current).square().sum(1)
        expected.append(int(score.masked_fill(~alive, -math.inf).argmax()))
    assert greedy_order(items[None], similarity)[0].tolist() == expected


def test_inverse_of_an_inverse_is_the_permutation() -> None:
    permutation = torch.stack([torch.randperm(50) for _ in range(3)])
    assert torch.equal(inverse(inverse(permutation)), permutation)
    assert torch.equal(permutation.gather(1, inverse(permutation)), torch.arange(50).expand(3, 50))


def test_packed_in_filter_order_of_resnet20_is_20_kib() -> None:
    layout = Layout.from_module(Original("cifar_resnet20").net)
    bits = packed_bits(layout, "in_filter")
    assert bits == sum(o * i * math.ceil(math.log2(i)) + o * math.ceil(math.log2(o)) for o, i in _sizes(layout))
    assert round(bits / 8 / 2**20, 3) == 0.020
    assert packed_bits(layout, "none") == 0
    assert packed_bits(layout, "cross_filter") > 1.8 * bits


def _sizes(layout: Layout) -> list[tuple[int, int]]:
    return [(layer.shape[0], layer.shape[1]) for layer in layout.layers]


def test_damaged_files_of_the_compiler_are_compiled_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))

    def order() -> list[list[int]]:
        greedy._compiled.cache_clear()  # reads the files again, as a new process would
        return greedy_order(torch.eye(3)[None]).tolist()

    expected = order()
    for pattern in ("*.nbc", "*.nbi"):
        files = list(tmp_path.rglob(pattern))
        assert files
        for file in files:
            file.write_bytes(file.read_bytes()[:50])
        assert order() == expected == [[0, 1, 2]]
    greedy._compiled.cache_clear()
