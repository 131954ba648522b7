"""Numbers of addresses, for predictors that store something per kernel.

Shapes: L layers, N addresses.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def numbering(layers: Sequence[tuple[int, int]]) -> Tensor:
    """The number of each layer's first address, and its number of channels: (L, 2) int64, for `numbers`.

    Args:
        layers: The numbers of filters and channels of each layer.

    >>> numbering([(2, 3), (4, 5)]).tolist()
    [[0, 3], [6, 5]]
    """
    grids_L2 = torch.tensor(layers)
    kernels_L = grids_L2.prod(1)
    return torch.stack([kernels_L.cumsum(0) - kernels_L, grids_L2[:, 1]], dim=1)


def numbers(numbering_L2: Tensor, addresses_N3: Tensor) -> Tensor:
    """The number of each address, (N,): 0, 1, ... by layer, then filter, then channel.

    >>> numbers(numbering([(2, 3), (4, 5)]), torch.tensor([[0, 1, 2], [1, 1, 0]])).tolist()
    [5, 11]
    """
    layer_N, filter_N, channel_N = addresses_N3.unbind(1)
    start_N, channels_N = numbering_L2[layer_N].unbind(1)
    return start_N + filter_N * channels_N + channel_N
