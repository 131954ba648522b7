"""Pure functions of a representation that return tables or figures."""

from nernlit.analysis.figures import kernel_figure, layer_error_figure, rounds_figure, tradeoff_figure
from nernlit.analysis.layers import LayerError, layer_errors
from nernlit.analysis.paired import PairedDifference, paired_difference

__all__ = [
    "LayerError",
    "PairedDifference",
    "kernel_figure",
    "layer_error_figure",
    "layer_errors",
    "paired_difference",
    "rounds_figure",
    "tradeoff_figure",
]
