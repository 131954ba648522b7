"""BatchNorm layers in evaluation mode: a scale and a shift of each channel.

Shapes: C channels.
"""

import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from nernlit.utilities.sharing import names_of_weights

#: Layers that apply `torch.nn.functional.batch_norm` to their input; a subclass may do something else.
_KNOWN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, BatchNormAct2d)


def factor_and_offset(norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """The scale and the shift (C,) that a BatchNorm layer in evaluation mode applies to each channel, in float64."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    factor_C = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.affine:
        factor_C = factor_C * norm.weight
    offset_C = -norm.running_mean * factor_C
    return factor_C, offset_C + norm.bias if norm.affine else offset_C


@torch.no_grad()
def without_statistics(net: nn.Module) -> dict[str, Tensor]:
    """The entries of a network's state dict that change if the statistics of its BatchNorm layers become 0 and 1.

    Means and variances move into the weights and biases of the same layers. In evaluation mode the network's outputs
    are the same up to rounding. Layers without weights, with shared ones, or of an unknown class are left out.
    """
    names = names_of_weights(net)
    changed: dict[str, Tensor] = {}
    for name, norm in net.named_modules():
        if type(norm) not in _KNOWN or not norm.affine or norm.running_mean is None:
            continue
        keys = [f"{name}.{part}".removeprefix(".") for part in ("weight", "bias", "running_mean", "running_var")]
        if any(len(names[key]) > 1 for key in keys):
            continue
        factor_C, offset_C = factor_and_offset(norm)
        weight_C = factor_C * (1 + norm.eps) ** 0.5  # the layer divides by sqrt(1 + eps)
        values = weight_C, offset_C, torch.zeros_like(factor_C), torch.ones_like(factor_C)
        changed |= {key: value.to(norm.running_mean.dtype) for key, value in zip(keys, values, strict=True)}
    return changed
