"""Analyses of a representation or a classifier: pure functions that return numbers or matplotlib figures."""

from nernlit.analysis.attacks import Attack, accuracy_under, find_eps
from nernlit.analysis.figures import (
    curves_figure,
    energy_figure,
    interpolation_figure,
    kernel_figure,
    landscape_figure,
    layer_error_figure,
    rounds_figure,
)
from nernlit.analysis.layers import LayerError, layer_errors
from nernlit.analysis.null_model import noise_like
from nernlit.analysis.paired import PairedDifference, correct_answers, paired_difference
from nernlit.analysis.rivals import factorized, multiplied, pruned
from nernlit.analysis.spectrum import LayerEnergy, layer_energies, low_frequency_energy
from nernlit.analysis.tradeoffs import pareto_figure, tradeoff_figure, width_figure

__all__ = [
    "Attack",
    "LayerEnergy",
    "LayerError",
    "PairedDifference",
    "accuracy_under",
    "correct_answers",
    "curves_figure",
    "energy_figure",
    "factorized",
    "find_eps",
    "interpolation_figure",
    "kernel_figure",
    "landscape_figure",
    "layer_energies",
    "layer_error_figure",
    "layer_errors",
    "low_frequency_energy",
    "multiplied",
    "noise_like",
    "paired_difference",
    "pareto_figure",
    "pruned",
    "rounds_figure",
    "tradeoff_figure",
    "width_figure",
]
