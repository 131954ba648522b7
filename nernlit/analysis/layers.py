"""The reconstruction error of each layer."""

import math
from dataclasses import dataclass

import torch

from nernlit.analysis.finite import require_finite
from nernlit.losses import explained_power, reconstruction_rmse
from nernlit.representation import Representation


@dataclass(frozen=True)
class LayerError:
    """One layer's reconstruction error.

    Attributes:
        name: Module name.
        rmse: Root-mean-square error in weight units.
        explained_power: 1 - mean squared error / mean squared weight; NaN if all of the original's weights are zero.
    """

    name: str
    rmse: float
    explained_power: float


@torch.no_grad()
def layer_errors(representation: Representation) -> list[LayerError]:
    """The error of every predicted layer, in the network's order.

    Raises:
        UsageError: If a predicted weight is not finite.
    """
    predicted, target = representation.weights(), representation.original_weights()
    require_finite(predicted)
    errors = []
    for layer in representation.layout.layers:
        # In float64: the squares of very small and very large weights would under- or overflow in float32.
        own, original = predicted[layer.key].flatten(0, 1).double(), target[layer.key].flatten(0, 1).double()
        explained = float(explained_power(own, original)) if bool(original.any()) else math.nan
        errors.append(LayerError(layer.name, float(reconstruction_rmse(own, original)), explained))
    return errors
