import pytest

from nernlit.analysis import kernel_figure, layer_error_figure, layer_errors, rounds_figure, tradeoff_figure
from tests.fakes import tiny_representation


def test_errors_of_the_layers_add_up_to_the_error_of_the_whole() -> None:
    representation = tiny_representation()
    errors = layer_errors(representation)
    assert [error.name for error in errors] == ["stem", "depthwise", "pointwise", "wide"]
    squares = sum(e.rmse**2 * layer.weights for e, layer in zip(errors, representation.layout.layers, strict=True))
    mask = representation.mask()
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
