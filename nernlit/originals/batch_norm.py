"""Moving the running statistics of BatchNorm layers into their weights and biases, so that files are smaller.

Shapes: C channels.
"""

from collections.abc import Mapping

import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from nernlit.utilities.sharing import names_of_weights

#: Layers that apply `torch.nn.functional.batch_norm` to their input; a subclass may do something else.
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, BatchNormAct2d)


@torch.no_grad()
def without_statistics(net: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The entries of a network's state dict that change if the statistics of its BatchNorm layers become 0 and 1.

    See `with_statistics`.
    """
    ones = {key: value.new_ones(()).expand_as(value) for key, value in state.items() if key.endswith("running_var")}
    zeros = {key: value.new_zeros(()).expand_as(value) for key, value in state.items() if key.endswith("running_mean")}
    return with_statistics(net, state, ones | zeros)


def with_statistics(net: nn.Module, state: Mapping[str, Tensor], statistics: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The entries of a network's state dict that change if its BatchNorm layers get other statistics.

    The difference moves into the weights and biases of the same layers. In evaluation mode the network's outputs are
    the same up to rounding. Layers without weights, with shared ones, or of an unknown class are left out.

    Args:
        net: The network, which says where BatchNorm layers are.
        state: The values of its tensors.
        statistics: The new means and variances, under their state-dict keys; others in it are not used.
    """
    names = names_of_weights(net)
    changed: dict[str, Tensor] = {}
    for name, norm in net.named_modules():
        if type(norm) not in BATCH_NORMS or not norm.affine or norm.running_mean is None:
            continue
        keys = [f"{name}.{part}".removeprefix(".") for part in ("weight", "bias", "running_mean", "running_var")]
        if any(len(names[key]) > 1 for key in keys):
            continue
        if all(torch.equal(state[key], statistics[key]) for key in keys[2:]):
            continue
        weight_C, bias_C, mean_C, variance_C = (state[key].double() for key in keys)
        new_mean_C, new_variance_C = (statistics[key].double() for key in keys[2:])
        factor_C = weight_C * (variance_C + norm.eps).rsqrt()
        new_weight_C = factor_C * (new_variance_C + norm.eps) ** 0.5
        new_bias_C = bias_C + (new_mean_C - mean_C) * factor_C
        for key, value in zip(keys, (new_weight_C, new_bias_C, new_mean_C, new_variance_C), strict=True):
            changed[key] = value.to(state[key].dtype)
    return changed
