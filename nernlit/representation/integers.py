"""Weights as integers times step sizes, where a quantized table predicts them."""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from nernlit.coding import predicted_weights
from nernlit.errors import UsageError
from nernlit.predictors import Quantized, Table
from nernlit.representation.representation import Representation


@dataclass(frozen=True)
class IntegerWeight:
    """A weight that is `integers * steps`.

    Attributes:
        integers: int8, of the weight's shape.
        steps: float32; a scalar, or a number for each of the weight's rows (output channels), of shape (rows,).
    """

    integers: Tensor
    steps: Tensor


@torch.no_grad()
def integer_weights(representation: Representation) -> dict[str, IntegerWeight]:
    """The predicted weights as integers: state-dict key -> weight.

    Raises:
        UsageError: If the predictor is no quantized table, an integer is beyond -127..127, or an output channel of a
            weight has several step sizes.
    """
    predictor = representation.predictor
    inner = predictor.unquantized
    if not isinstance(predictor, Quantized) or not isinstance(inner, Table):
        raise UsageError(
            f"weights as integers need a quantized Table; {type(inner).__name__} "
            f"{'computes weights from its integers' if inner is not predictor else 'is not quantized'}. Leave out "
            "--integers, or fit with --model.representation.predictor Table and --model.representation.quantize.bits N."
        )
    # A table is linear in its entries: with the step sizes as entries it gives the step size of each weight.
    at_steps = copy.deepcopy(inner)
    for name, value in {**predictor.rounded_parameters(), **predictor.step_sizes()}.items():
        at_steps.get_parameter(name).copy_(value)
    # Without setting kept zeros to 0: the step sizes of all weights of a row are compared.
    parts = representation.predictor.block, representation.layout, representation.addresses, representation.scale
    steps, weights = predicted_weights(at_steps, *parts), representation.weights()
    return {key: _integer_weight(key, weight.cpu(), steps[key].cpu()) for key, weight in weights.items()}


def _integer_weight(key: str, weight: Tensor, steps: Tensor) -> IntegerWeight:
    rows = steps.flatten(1).abs()
    if not torch.equal(rows, rows[:, :1].expand_as(rows)):
        raise UsageError(
            f"an output channel of {key} has several step sizes, and ONNX stores one; leave out --integers, or fit "
            "with --model.representation.order none."
        )
    integers = torch.where(steps == 0, 0, weight / steps.abs()).round()  # a trained scale may be negative or 0
    if (largest := int(integers.abs().max())) > 127:
        raise UsageError(
            f"{key} has integers up to {largest}, and int8 holds 127; leave out --integers, or fit with fewer "
            "--model.representation.quantize.bits."
        )
    per_row = rows[:, 0]
    return IntegerWeight(integers.to(torch.int8), per_row[0] if bool((per_row == per_row[0]).all()) else per_row)
