"""Flat indices of addresses, and sets of layers, for predictors that store something per kernel or per set.

Shapes: L layers, N addresses.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor

Share = Literal["network", "stage", "layer"]


def layer_strides(layers: Sequence[tuple[int, int]]) -> Tensor:
    """The flat index of each layer's first address, and its number of channels: (L, 2) int64, for `flat_index`.

    Args:
        layers: The numbers of filters and channels of each layer.

    >>> layer_strides([(2, 3), (4, 5)]).tolist()
    [[0, 3], [6, 5]]
    """
    grids_L2 = torch.tensor(layers)
    kernels_L = grids_L2.prod(1)
    return torch.stack([kernels_L.cumsum(0) - kernels_L, grids_L2[:, 1]], dim=1)


def flat_index(strides_L2: Tensor, addresses_N3: Tensor) -> Tensor:
    """The flat index of each address, (N,) int64, counted by layer, then filter, then channel.

    >>> flat_index(layer_strides([(2, 3), (4, 5)]), torch.tensor([[0, 1, 2], [1, 1, 0]])).tolist()
    [5, 11]
    """
    layer_N, filter_N, channel_N = addresses_N3.unbind(1)
    start_N, channels_N = strides_L2[layer_N].unbind(1)
    return start_N + filter_N * channels_N + channel_N


def sets_of(layers: Sequence[tuple[int, int]], share: Share) -> list[int]:
    """The index of each layer's set: one set for the network, one per stage, or one per layer.

    A stage starts at each layer with more filters than all layers before it; in a ResNet18 these are its stages.

    >>> sets_of([(16, 3), (16, 16), (32, 16), (16, 32), (64, 16)], "stage")
    [0, 0, 1, 1, 2]
    """
    if share == "layer":
        return list(range(len(layers)))
    largest = list(accumulate((filters for filters, _ in layers), max))
    return [sorted(set(largest)).index(filters) if share == "stage" else 0 for filters in largest]
