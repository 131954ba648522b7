"""A predictor without compression: a free kernel per address.

Shapes: N addresses, R kernels of the representation, K x K their size.
"""

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from nernlit.errors import UsageError
from nernlit.predictors.base import Predictor
from nernlit.predictors.numbering import numbering, numbers


@final
class Table(Predictor):
    """Every kernel is a parameter. A new representation starts with the original's kernels: it has no error.

    Args:
        kernel_size: Size of the predicted kernels: the side of a square, or (height, width). A layer with smaller
            kernels uses their center crop.
    """

    numbering: Tensor

    def bind(self, layers: Sequence[tuple[int, int]]) -> None:
        self.set_constant("numbering", numbering(layers))
        kernels = sum(filters * channels for filters, channels in layers)
        self.entries = nn.Parameter(torch.empty(kernels, *self.block))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all kernels from a normal distribution."""
        nn.init.normal_(self.entries)

    @torch.no_grad()
    def fit(self, blocks_NKK: Tensor, addresses_N3: Tensor, weights_NKK: Tensor) -> None:
        self.entries[numbers(self.numbering, addresses_N3)] = blocks_NKK.to(self.entries)

    def forward(self, addresses_N3: Tensor) -> Tensor:
        if not hasattr(self, "entries"):
            raise UsageError("the Table does not know its addresses; call bind(layers) first, or use a Representation.")
        entries_RD = self.entries.flatten(1)
        flat = embedding(numbers(self.numbering, addresses_N3), entries_RD)
        return flat.view(-1, *self.block).to(torch.promote_types(flat.dtype, torch.float32))
