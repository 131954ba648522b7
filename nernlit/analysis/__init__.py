"""Pure functions of a representation that return tables or figures."""

from nernlit.analysis.figures import kernel_figure, layer_error_figure, rounds_figure, tradeoff_figure
from nernlit.analysis.layers import LayerError, layer_errors

__all__ = ["LayerError", "kernel_figure", "layer_error_figure", "layer_errors", "rounds_figure", "tradeoff_figure"]
