"""Scales of groups of kernels: one per layer, or one per filter.

Shapes: N addresses, D numbers of a kernel, G scales.
"""

from collections.abc import Sequence
from typing import Literal, final

import torch
from torch import Tensor, nn

from nernlit.errors import require_one_of
from nernlit.utilities.constants import WithConstants

Scale = Literal["none", "layer", "filter"]


@final
class Scales(WithConstants):
    """One trained number for each layer's or each filter's kernels.

    Args:
        kind: Which kernels have the same scale: `none` (the scale is 1), those of a layer, or of a filter.
    """

    first_filter: Tensor

    def __init__(self, kind: Scale) -> None:
        super().__init__()
        require_one_of(Scale, scale=kind)
        self.kind = kind

    def bind(self, layers: Sequence[tuple[int, int]]) -> None:
        """Create the scales of these layers' numbers of filters and channels."""
        filters = [filters for filters, _ in layers]
        self.set_constant("first_filter", torch.tensor([0, *filters]).cumsum(0)[:-1])
        if self.kind != "none":
            self.values = nn.Parameter(torch.ones(len(layers) if self.kind == "layer" else sum(filters)))

    def reset_parameters(self) -> None:
        """Set all scales to 1."""
        if self.kind != "none":
            nn.init.ones_(self.values)

    @torch.no_grad()
    def fit(self, blocks_ND: Tensor, addresses_N3: Tensor, weights_ND: Tensor) -> None:
        """Set each scale to the weighted root mean square of the entries of its kernels, or to 1 if they are all 0.

        Args:
            blocks_ND: The kernels.
            addresses_N3: The address of each.
            weights_ND: Weight of each entry, or (N, 1), of each kernel's entries.
        """
        if self.kind == "none":
            return
        group_N = self._group(addresses_N3)
        power_G, weight_G = torch.zeros(2, len(self.values)).to(blocks_ND).unbind()
        power_G.index_add_(0, group_N, blocks_ND.square().mul_(weights_ND).sum(1))
        weight_G.index_add_(0, group_N, weights_ND.expand_as(blocks_ND).sum(1))
        scale_G = (power_G / weight_G).sqrt()
        self.values.copy_(scale_G.where(scale_G > 0, 1))

    def forward(self, addresses_N3: Tensor) -> Tensor:
        """The scale of each address, (N,). Not for the kind `none`, which has no scales."""
        return self.values[self._group(addresses_N3)]

    def _group(self, addresses_N3: Tensor) -> Tensor:
        layer_N, filter_N, _ = addresses_N3.long().unbind(1)
        return layer_N if self.kind == "layer" else self.first_filter[layer_N] + filter_N
