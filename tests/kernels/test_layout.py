import re
from typing import Any

import pytest
import timm
import torch

from nernlit.errors import LayoutError
from nernlit.kernels import LayerFilter, Layout
from tests.fakes import TinyCNN


def test_table_and_back_is_exact_to_the_bit_for_every_kind_of_convolution() -> None:
    net = TinyCNN()
    layout = Layout.from_module(net)
    table = layout.table(net.state_dict())
    assert table.shape == (layout.num_kernels, 5, 5)
    for key, value in layout.weights(table).items():
        assert torch.equal(value, net.state_dict()[key])


def test_layout_counts_kernels_and_weights_of_grouped_layers() -> None:
    layout = Layout.from_module(TinyCNN())
    shapes = {layer.key: layer.shape for layer in layout.layers}
    assert shapes["depthwise.weight"] == (6, 1, 3, 3)
    assert shapes["pointwise.weight"] == (8, 3, 1, 1)
    assert layout.num_kernels == 6 + 6 + 24 + 32
    assert layout.num_weights == 6 * 25 + 6 * 9 + 24 + 32 * 3


def test_a_smaller_kernel_is_the_centre_of_its_row() -> None:
    layout = Layout([("big", (1, 1, 3, 3)), ("small", (1, 1, 1, 1)), ("row", (1, 1, 1, 3))])
    weights = layout.weights(torch.arange(27.0).view(3, 3, 3))
    assert weights["small"].item() == 9 + 4
    assert weights["row"].flatten().tolist() == [18 + 3, 18 + 4, 18 + 5]


def test_a_table_of_any_size_gives_the_weights_back() -> None:
    layout = Layout([("even", (2, 3, 4, 4)), ("odd", (2, 2, 3, 3)), ("pixel", (1, 2, 1, 1))])
    state = {layer.key: torch.randn(layer.shape) for layer in layout.layers}
    for size in ((4, 4), (5, 5), (6, 6), (9, 9), (4, 7), (6, 5)):
        for key, value in layout.weights(layout.table(state, size)).items():
            assert torch.equal(value, state[key])


def test_replaced_kernels_are_those_of_the_table() -> None:
    net = TinyCNN()
    layout = Layout.from_module(net)
    table = layout.table(net.state_dict())
    rows = torch.tensor([0, 5, 6, 11, 40, layout.num_kernels - 1])  # the third layer has none
    kernels = torch.randn(6, 5, 5, requires_grad=True)
    replaced = layout.with_kernels(layout.weights(table), rows, kernels)
    expected = layout.weights(table.index_copy(0, rows, kernels))
    assert list(replaced) == list(expected)
    for key, value in expected.items():
        assert torch.equal(replaced[key], value)
    gradients = [
        torch.autograd.grad(sum(value.square().sum() for value in entries.values()), kernels)[0]  # type: ignore[arg-type]
        for entries in (replaced, expected)
    ]
    assert torch.equal(*gradients)


def test_masks_mark_exactly_the_weights() -> None:
    layout = Layout.from_module(TinyCNN())
    masks, numbers = layout.masks((5, 5))
    assert int(masks[numbers.long()].sum()) == layout.num_weights


def test_include_and_exclude_go_by_name_and_kernel_size() -> None:
    def names(rule: LayerFilter) -> list[str]:
        return [layer.key for layer in Layout.from_module(TinyCNN(), rule).layers]

    assert names(LayerFilter(include=["*wise"])) == ["depthwise.weight", "pointwise.weight"]
    assert names(LayerFilter(exclude=["stem", "w*"])) == ["depthwise.weight", "pointwise.weight"]
    assert names(LayerFilter(kernel_sizes=[3])) == ["depthwise.weight", "wide.weight"]


def test_the_papers_choice_of_resnet18_has_its_number_of_weights() -> None:
    layout = Layout.from_module(timm.create_model("resnet18"), "stages_3x3")
    assert len(layout.layers) == 16
    assert layout.num_weights == 10_985_472


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (LayerFilter(include=["stem", "wyde"]), r"layers\.include: the pattern 'wyde' matches no .*mean 'wide'\?"),
        (LayerFilter(exclude=["wide.*"]), r"layers\.exclude: the pattern 'wide\.\*' matches no .*did you mean 'wide'"),
        (
            LayerFilter(include=["zzzz"]),
            r"'zzzz' matches no convolution; the convolutions are stem, depthwise, pointwise, wide",
        ),
        (
            LayerFilter(kernel_sizes=[3, 7]),
            r"layers\.kernel_sizes: none of the included convolutions has kernels of size 7; their sizes are 1, 3, 5",
        ),
        (LayerFilter(exclude=["*"]), r"selects none of the network's 4 convolutions \(stem, depthwise"),
        (LayerFilter(include=[]), r"selects none of the network's 4 convolutions"),
        (LayerFilter(kernel_sizes=[]), r"selects none of the network's 4 convolutions"),
        ("stages_3x3", r"layers='stages_3x3': the pattern 'layer\[1-4\]\.\*' matches no convolution"),
        (
            "stage_3x3",
            r"layers='stage_3x3'; expected 'all_convs' or 'stages_3x3' or 'all_linear' or 'all', or a LayerFilter",
        ),
        (
            ["stem"],
            r"layers=\['stem'\]; expected 'all_convs' or 'stages_3x3' or 'all_linear' or 'all', or a LayerFilter",
        ),
    ],
)
def test_a_choice_that_matches_nothing_is_named_with_what_is_close(rule: Any, message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        Layout.from_module(TinyCNN(), rule)


def test_close_patterns_are_suggested_for_stages() -> None:
    net = timm.create_model("cifar_resnet20")
    with pytest.raises(LayoutError, match=r"'layr2\.\*' matches no convolution; did you mean 'layer2\.\*'"):
        Layout.from_module(net, LayerFilter(include=["layer1.*", "layr2.*"]))
    with pytest.raises(LayoutError, match=r"'layer2' matches no convolution; did you mean 'layer2\.\*'\?"):
        Layout.from_module(net, LayerFilter(include=["layer2"]))


@pytest.mark.parametrize(
    "options", [{"include": "layer1.*"}, {"exclude": "stem"}, {"kernel_sizes": 3}, {"kernel_sizes": ["3"]}]
)
def test_patterns_are_lists(options: dict[str, Any]) -> None:
    ((name, value),) = options.items()
    with pytest.raises(LayoutError, match=rf"layers\.{name}={re.escape(repr(value))}; expected a list, for example"):
        LayerFilter(**options)


def test_networks_without_a_convolution_or_with_computed_weights_are_refused() -> None:
    with pytest.raises(LayoutError, match="the network has no convolution"):
        Layout.from_module(torch.nn.Linear(2, 2))
    net = torch.nn.Sequential(torch.nn.utils.parametrizations.weight_norm(torch.nn.Conv2d(2, 2, 3)))
    with pytest.raises(LayoutError, match="the weight of '0' is not in the state dict: it is computed"):
        Layout.from_module(net)


def test_a_network_that_is_one_convolution_has_a_layout() -> None:
    (layer,) = Layout.from_module(torch.nn.Conv2d(2, 3, 3)).layers
    assert (layer.key, layer.shape) == ("weight", (3, 2, 3, 3))
