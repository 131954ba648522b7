import io
import math

import pytest
import torch

from nernlit.analysis import (
    energy_figure,
    kernel_figure,
    layer_energies,
    layer_error_figure,
    layer_errors,
    rounds_figure,
    tradeoff_figure,
)
from nernlit.errors import LayoutError
from nernlit.predictors import MLP
from nernlit.representation import Representation
from tests.fakes import tiny_original, tiny_representation


def test_errors_of_the_layers_add_up_to_the_error_of_the_whole() -> None:
    representation = tiny_representation()
    errors = layer_errors(representation)
    assert [error.name for error in errors] == ["stem", "depthwise", "pointwise", "wide"]
    squares = sum(e.rmse**2 * layer.weights for e, layer in zip(errors, representation.layout.layers, strict=True))
    mask = representation.learned.mask()
    difference = (representation.kernels() - representation.target)[mask].detach()
    assert squares == pytest.approx(float(difference.square().sum()), rel=1e-5)


def test_figures_show_every_layer_and_both_networks() -> None:
    representation = tiny_representation()
    errors = layer_errors(representation)
    assert [len(axis.patches) for axis in layer_error_figure({"one": errors}).axes] == [4, 4]
    pair = layer_error_figure({"one": errors, "other": errors}).axes
    assert [len(axis.patches) for axis in pair] == [8, 8]
    assert pair[0].patches[4].get_height() == errors[0].rmse
    assert len(kernel_figure(representation, count=3).axes) == 6
    tradeoff = tradeoff_figure({"one": [(0.3, 0.5), (1.2, 0.9)], "other": [(0.3, 0.7)]}, 0.92, "title")
    assert tradeoff.axes[0].lines[1].get_xydata().tolist() == [[30, 50], [120, 90]]
    assert tradeoff.axes[0].lines[2].get_xydata().tolist() == [[30, 70]]
    rounds = rounds_figure([0.91, 0.92], [0.001, 0.002], 0.9)
    assert rounds.axes[0].lines[1].get_xydata().tolist() == [[1, 91], [2, 92]]
    assert rounds.axes[1].lines[0].get_xydata().tolist() == [[1, 0.001], [2, 0.002]]


def test_a_layer_of_zeros_has_an_error_and_no_variance_to_explain() -> None:
    original = tiny_original()
    original.net.get_parameter("wide.weight").data.zero_()
    representation = Representation(original, MLP(8, kernel_size=5, num_frequencies=4))
    *others, zero = layer_errors(representation)
    assert math.isnan(zero.explained_power)
    assert zero.rmse == pytest.approx(
        float(representation.weights()["wide.weight"].detach().square().mean().sqrt()), rel=1e-5
    )
    assert all(math.isfinite(error.explained_power) for error in others)
    figure = layer_error_figure({"one": [*others, zero]})
    figure.savefig(io.BytesIO())
    energies = layer_energies(representation)
    assert math.isnan(energies[-1].original)
    energy_figure({"one": energies}).savefig(io.BytesIO())


@pytest.mark.parametrize("factor", [1e-30, 1e30])
def test_errors_of_very_small_and_large_weights_are_those_of_the_same_network_at_scale_one(factor: float) -> None:
    outcomes = []
    for own in (1.0, factor):
        original = tiny_original()
        for module in original.net.modules():
            if isinstance(module, torch.nn.Conv2d):
                module.weight.data.mul_(own)
        torch.manual_seed(0)
        errors = layer_errors(Representation(original, MLP(8, kernel_size=5, num_frequencies=4)))
        outcomes.append([(error.rmse / own, error.explained_power) for error in errors])
    for one, other in zip(*outcomes, strict=True):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-3)


def test_a_network_of_zeros_is_refused() -> None:
    original = tiny_original()
    for parameter in original.parameters():
        parameter.data.zero_()
    with pytest.raises(LayoutError, match=r"all weights of the predicted layers \(stem, depthwise, .*are 0"):
        Representation(original, MLP(8, kernel_size=5, num_frequencies=4))
