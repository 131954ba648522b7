"""How far each layer is from the original's."""

from dataclasses import dataclass

import torch

from nernlit.losses import reconstruction_rmse, variance_explained
from nernlit.representation import Representation


@dataclass(frozen=True)
class LayerError:
    """One layer's reconstruction error.

    Attributes:
        name: Module name.
        rmse: Root-mean-square error in weight units.
        variance_explained: 1 - mean squared error / mean squared weight.
    """

    name: str
    rmse: float
    variance_explained: float


@torch.no_grad()
def layer_errors(representation: Representation) -> list[LayerError]:
    """The error of every predicted layer, in the network's order."""
    predicted, target = representation.weights(), representation.original_weights()
    errors = []
    for layer in representation.layout.layers:
        pair = predicted[layer.key].flatten(0, 1), target[layer.key].flatten(0, 1)
        name = layer.name
        errors.append(LayerError(name, float(reconstruction_rmse(*pair)), float(variance_explained(*pair))))
    return errors
