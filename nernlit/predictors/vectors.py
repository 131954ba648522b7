"""Learned vectors of address indices.

Shapes: N addresses, V length of a vector.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Literal, final

import torch
from torch import Tensor, nn

from nernlit.utilities.constants import WithConstants

VectorShare = Literal["network", "layer"]


@final
class AddressVectors(WithConstants):
    """A learned vector for the layer, one for the filter and one for the channel of an address.

    Args:
        width: Length V of each vector.
        share: Whether filter f has the same vector in all layers (`network`), or another one in each (`layer`);
            likewise channels.
    """

    first: Tensor

    def __init__(self, width: int, share: VectorShare) -> None:
        super().__init__()
        self.width, self.share = width, share

    def bind(self, layers: Sequence[tuple[int, int]], device: torch.device) -> None:
        """Create the vectors of these layers' numbers of filters and channels, from a normal distribution."""
        counts = list(zip(*layers, strict=True))
        sizes = [sum(each) if self.share == "layer" else max(each) for each in counts]
        self.tables = nn.ModuleList(nn.Embedding(size, self.width, device=device) for size in (len(layers), *sizes))
        if self.share == "layer":
            firsts = [[0, *accumulate(each)][:-1] for each in counts]
            self.set_constant("first", torch.tensor(firsts, device=device).T)

    def forward(self, addresses_N3: Tensor) -> Tensor:
        """The vectors of each address, one after the other: (N, 3V)."""
        layer_N, *others = addresses_N3.unbind(1)
        if self.share == "layer":
            others = [first_N + index_N for first_N, index_N in zip(self.first[layer_N].T, others, strict=True)]
        return torch.cat([table(index_N) for table, index_N in zip(self.tables, (layer_N, *others), strict=True)], 1)
