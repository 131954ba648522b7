"""BatchNorm layers without statistics, for fewer bytes.

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

    Means and variances move into the weights and biases of the same layers. In evaluation mode the network's outputs
    are the same up to rounding. Layers without weights, with shared ones, or of an unknown class are left out.

    Args:
        net: The network, which says where BatchNorm layers are.
        state: The values of its tensors.
    """
    names = names_of_weights(net)
    changed: dict[str, Tensor] = {}
    for name, norm in net.named_modules():
        if type(norm) not in BATCH_NORMS or not norm.affine or norm.running_mean is None:
            continue
        keys = [f"{name}.{part}".removeprefix(".") for part in ("weight", "bias", "running_mean", "running_var")]
        if any(len(names[key]) > 1 for key in keys):
            continue
        weight_C, bias_C, mean_C, variance_C = (state[key].double() for key in keys)
        factor_C = weight_C * (variance_C + norm.eps).rsqrt()
        # The layer will divide by sqrt(1 + eps).
        new = factor_C * (1 + norm.eps) ** 0.5, bias_C - mean_C * factor_C, mean_C.new_zeros(()), mean_C.new_ones(())
        for key, value in zip(keys, new, strict=True):
            changed[key] = value.expand_as(state[key]).to(state[key].dtype)
    return changed
