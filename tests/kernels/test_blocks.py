import math
import random

import pytest
import torch
from torch import nn

from nernlit.errors import LayoutError
from nernlit.kernels import LayerFilter, Layout, Pointwise, addresses, are_addresses, pack_order, unpack_order

EVERY_KIND = nn.ModuleDict(
    {
        "conv1d": nn.Conv1d(4, 3, 5),
        "conv1d_pointwise": nn.Conv1d(4, 3, 1),
        "conv2d": nn.Conv2d(4, 6, 3, groups=2, dilation=2),
        "row": nn.Conv2d(2, 3, (1, 5)),
        "column": nn.Conv2d(2, 3, (5, 1)),
        "pointwise": nn.Conv2d(5, 7, 1),
        "depthwise": nn.Conv2d(4, 4, 3, groups=4),
        "conv3d": nn.Conv3d(2, 3, (2, 3, 4)),
        "transposed": nn.ConvTranspose2d(3, 4, 2),
        "linear": nn.Linear(10, 7),
        "attention": nn.MultiheadAttention(6, 2),
        "cross_attention": nn.MultiheadAttention(6, 2, kdim=4, vdim=3),
    }
)


@pytest.mark.parametrize("pointwise", ["crop", "tile"])
@pytest.mark.parametrize("seed", range(40))
def test_table_and_back_is_exact_to_the_bit_for_any_shapes(seed: int, pointwise: Pointwise) -> None:
    draw = random.Random(seed)
    shapes = [[draw.randint(1, 9) for _ in range(draw.randint(2, 5))] for _ in range(draw.randint(1, 4))]
    shapes[0][2:] = [1] * len(shapes[0][2:])  # linear or pointwise
    tile = (draw.randint(1, 6), draw.randint(1, 6))
    layout = Layout([(str(number), tuple(shape)) for number, shape in enumerate(shapes)], None, pointwise, tile)
    state = {layer.key: torch.randn(layer.shape) for layer in layout.layers}
    block = (layout.block[0] + draw.randint(0, 3), layout.block[1] + draw.randint(0, 3))
    table = layout.table(state, block)
    assert table.shape == (layout.num_kernels, *block)
    for key, weight in layout.weights(table).items():
        assert torch.equal(weight, state[key])
    assert layout.num_weights == sum(math.prod(shape) for shape in shapes)
    masks, numbers = layout.masks(block)
    assert torch.equal(masks[numbers.long()], table != 0)
    rows = torch.arange(0, layout.num_kernels, 2)
    kernels = torch.randn(len(rows), *block)
    replaced = layout.with_kernels(state, rows, kernels)
    expected = layout.weights(table.index_copy(0, rows, kernels))
    assert all(torch.equal(replaced[key], expected[key]) for key in state)


@pytest.mark.parametrize("pointwise", ["crop", "tile"])
@pytest.mark.parametrize("order", ["none", "in_filter", "cross_filter"])
def test_orders_of_every_kind_of_layer_are_packed_and_unpacked(pointwise: Pointwise, order: str) -> None:
    layout = Layout.from_module(EVERY_KIND, "all", pointwise, tile=4)
    table_N3 = addresses(layout, EVERY_KIND.state_dict(), order)  # type: ignore[arg-type]
    assert are_addresses(layout, table_N3)
    packed = pack_order(layout, table_N3, order)  # type: ignore[arg-type]
    assert torch.equal(unpack_order(layout, packed, order), table_N3)  # type: ignore[arg-type]


def test_a_matrix_is_divided_into_tiles_row_by_row_with_padding_at_the_edges() -> None:
    layout = Layout([("linear.weight", (3, 5))], tile=2)
    table = layout.table({"linear.weight": torch.arange(1.0, 16.0).view(3, 5)})
    (layer,) = layout.layers
    assert layer.grid == (2, 3)
    assert table.tolist() == [
        [[1, 2], [6, 7]],
        [[3, 4], [8, 9]],
        [[5, 0], [10, 0]],
        [[11, 12], [0, 0]],
        [[13, 14], [0, 0]],
        [[15, 0], [0, 0]],
    ]
    assert (layout.num_kernels, layout.num_weights) == (6, 15)


def test_tiles_have_the_height_and_width_that_are_asked_for() -> None:
    layout = Layout([("linear.weight", (3, 5))], tile=(1, 3))
    table = layout.table({"linear.weight": torch.arange(1.0, 16.0).view(3, 5)})
    assert table.tolist() == [[[1, 2, 3]], [[4, 5, 0]], [[6, 7, 8]], [[9, 10, 0]], [[11, 12, 13]], [[14, 15, 0]]]
    with pytest.raises(LayoutError, match=r"tile=\(1, 0\); expected an integer of at least 1"):
        Layout([("linear.weight", (3, 5))], tile=(1, 0))


def test_the_table_is_as_high_and_wide_as_the_highest_and_widest_kernel() -> None:
    assert Layout([("long.weight", (2, 1, 512, 1)), ("wide.weight", (2, 2, 1, 3))]).block == (512, 3)
    assert Layout.from_module(nn.Sequential(nn.Conv1d(1, 2, 9), nn.Conv1d(2, 2, 5))).block == (1, 9)


def test_a_pointwise_convolution_is_a_crop_or_tiles() -> None:
    shape = ("conv.weight", (6, 9, 1, 1))
    crop, tile = Layout([shape]), Layout([shape], pointwise="tile", tile=3)
    assert (crop.num_kernels, crop.block, crop.num_weights) == (54, (1, 1), 54)
    assert (tile.num_kernels, tile.block, tile.num_weights) == (6, (3, 3), 54)


def test_kernels_of_one_and_three_dimensions_are_rows_and_stacks_of_kernels() -> None:
    layout = Layout.from_module(EVERY_KIND, LayerFilter(include=["conv1d", "conv3d", "transposed"]))
    blocks = {layer.name: (layer.grid, layer.block) for layer in layout.layers}
    assert blocks == {"conv1d": ((3, 4), (1, 5)), "conv3d": ((3, 4), (3, 4)), "transposed": ((3, 4), (2, 2))}


def test_presets_and_types_select_by_the_type_of_layer() -> None:
    def names(layers: object) -> list[str]:
        return [layer.name for layer in Layout.from_module(EVERY_KIND, layers).layers]  # type: ignore[arg-type]

    linear = ["linear", "attention.in_proj_weight", "attention.out_proj"]
    linear += [f"cross_attention.{part}_proj_weight" for part in "qkv"] + ["cross_attention.out_proj"]
    assert names("all_linear") == linear
    assert names("all_convs") == list(EVERY_KIND)[:9]
    assert names("all") == [*list(EVERY_KIND)[:9], *linear]
    assert names(LayerFilter(include=["attention.*"], types=["linear"])) == linear[1:3]
    assert names(LayerFilter(kernel_sizes=[1], types=["conv", "linear"])) == ["conv1d_pointwise", "pointwise", *linear]


def test_a_weight_tied_to_an_embedding_is_predicted_once() -> None:
    net = nn.Sequential(nn.Embedding(7, 5), nn.Linear(5, 7, bias=False))
    net[1].weight = net[0].weight
    (layer,) = Layout.from_module(net, "all_linear").layers
    assert (layer.key, layer.aliases) == ("0.weight", ("1.weight",))


def test_messages_name_the_type_of_layer() -> None:
    with pytest.raises(LayoutError, match=r"the network has no linear layer, so .* Convolutions are selected by .*all"):
        Layout.from_module(nn.Conv2d(1, 1, 3), "all_linear")
    with pytest.raises(LayoutError, match="'lin' matches no linear layer; did you mean 'linear'"):
        Layout.from_module(EVERY_KIND, LayerFilter(include=["lin"], types=["linear"]))
    with pytest.raises(LayoutError, match=r"'zzzz' matches no layer; the layers are conv1d, conv1d_pointwise, "):
        Layout.from_module(EVERY_KIND, LayerFilter(include=["zzzz"], types=["linear", "conv"]))
    with pytest.raises(LayoutError, match=r"layers.types=\['embedding'\]; expected a list of conv and linear"):
        LayerFilter(types=["embedding"])  # type: ignore[list-item]
    with pytest.raises(LayoutError, match="pointwise='pad'; expected 'crop' or 'tile'"):
        Layout.from_module(EVERY_KIND, pointwise="pad")  # type: ignore[arg-type]


@pytest.mark.parametrize("wrap", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm])
def test_computed_linear_weights_are_refused_only_where_they_would_be_predicted(wrap: object) -> None:
    net = nn.Sequential(nn.Conv2d(2, 2, 3), wrap(nn.Linear(2, 2)))  # type: ignore[operator]
    assert [layer.name for layer in Layout.from_module(net).layers] == ["0"]
    with pytest.raises(LayoutError, match="the weight of '1' is not in the state dict: it is computed"):
        Layout.from_module(net, "all")
