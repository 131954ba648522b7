"""A predictor without compression: each kernel is a parameter of its own.

Shapes: N addresses, R kernels of the representation, K x K their size.
"""

import math
from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from nernlit.errors import UsageError
from nernlit.predictors.base import Predictor
from nernlit.predictors.layer_strides import flat_index, layer_strides
from nernlit.predictors.scales import Scale, Scales
from nernlit.storage.entropy import Part
from nernlit.utilities.sides import Size


@final
class Table(Predictor):
    """Every kernel is a parameter. A new representation starts with the original's kernels: it has no error.

    Args:
        kernel_size: Size of the predicted kernels: the side of a square, or (height, width). A layer with smaller
            kernels uses their center crop.
        scale: Which kernels are multiplied by the same number, which is trained too: `none` (by 1), those of a layer,
            or of a filter. With a scale, the entries have unit root mean square at the start.
    """

    layer_strides: Tensor

    def __init__(self, kernel_size: Size = 3, scale: Scale = "none") -> None:
        super().__init__(kernel_size)
        self.scale = scale
        self.scales = Scales(scale)

    def bind(self, layers: Sequence[tuple[int, int]]) -> None:
        self.set_constant("layer_strides", layer_strides(layers))
        self.scales.bind(layers)
        self.layers = tuple(layers)
        kernels = sum(filters * channels for filters, channels in layers)
        self.entries = nn.Parameter(torch.empty(kernels, *self.block))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all kernels from a normal distribution."""
        nn.init.normal_(self.entries)
        self.scales.reset_parameters()

    @property
    def is_fitted(self) -> bool:
        return True

    def quantized_parts(self) -> dict[str, list[Part]]:
        """The used entries of each layer."""
        sides = [[len(range(*part.indices(side))) for part, side in pairs] for pairs in self._crops()]
        return {"entries": [(*layer, rows, columns) for layer, (rows, columns) in zip(self.layers, sides, strict=True)]}

    def used_masks(self) -> dict[str, Tensor]:
        if sum(map(math.prod, self.quantized_parts()["entries"])) == self.entries.numel():
            return {}
        used_RKK = torch.zeros_like(self.entries, dtype=torch.bool)
        counts = [filters * channels for filters, channels in self.layers]
        for part, ((rows, _), (columns, _)) in zip(used_RKK.split(counts), self._crops(), strict=True):
            part[:, rows, columns] = True
        return {"entries": used_RKK}

    def _crops(self) -> list[list[tuple[slice, int]]]:
        """Per layer, the used rows and columns, each as (slice, kernel side)."""
        whole = [tuple(slice(0, side) for side in self.block)] * len(self.layers)
        return [list(zip(crop, self.block, strict=True)) for crop in self.crops or whole]

    @torch.no_grad()
    def fit(self, blocks_NKK: Tensor, addresses_N3: Tensor, weights_NKK: Tensor) -> None:
        self.scales.fit(blocks_NKK.flatten(1), addresses_N3, weights_NKK.flatten(1))
        if self.scale != "none":
            blocks_NKK = blocks_NKK / self.scales(addresses_N3).view(-1, 1, 1)
        self.entries[flat_index(self.layer_strides, addresses_N3)] = blocks_NKK.to(self.entries)

    def forward(self, addresses_N3: Tensor) -> Tensor:
        if not hasattr(self, "entries"):
            raise UsageError("the Table does not know its addresses; call bind(layers) first, or use a Representation.")
        entries_RD = self.entries.flatten(1)
        flat = embedding(flat_index(self.layer_strides, addresses_N3), entries_RD)
        if self.scale != "none":
            flat = flat * self.scales(addresses_N3)[:, None]
        return flat.view(-1, *self.block).to(torch.promote_types(flat.dtype, torch.float32))
