"""The layout: conversion between the predicted weights of a state dict and one table of kernels.

Shapes: N kernels in total, K x K the size of a row (height Kh and width Kw may differ), S selected kernels.

Each row of the table is one 2-D block of a weight (see `blocks`), which is called a kernel, as it is one for
convolutions. Rows are sorted by layer, then filter, then channel. A kernel smaller than K x K is the center crop of its
row (NeRN, arXiv 2212.13554, section 3), so one predictor serves all layers.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Self, get_args

import torch
from torch import Tensor, nn

from nernlit.errors import LayoutError
from nernlit.kernels.blocks import Layer, Pointwise
from nernlit.kernels.layers import LayerFilter, LayerPreset, as_filter, select_layers
from nernlit.kernels.weights import candidates, require_replaceable
from nernlit.utilities.sharing import names_of_weights
from nernlit.utilities.sides import Size, sides


class Layout:
    """Maps the predicted kernels to rows of the kernel table.

    Args:
        layers: The predicted weights as (state-dict key, shape), in the network's order.
        aliases: For some of these keys, further keys of the same weight.
        pointwise: How 1x1 convolutions are divided, `crop` or `tile`.
        tile: Size of the tiles of linear weights and, with `pointwise: tile`, of 1x1 convolutions: the side of a
            square, or (filters, channels).

    Attributes:
        block: Height and width (Kh, Kw) in which the blocks of all layers fit.

    Raises:
        LayoutError: If `layers` is empty, `pointwise` is unknown, or `tile` is not one or two integers of at least 1.

    >>> layout = Layout([("conv.weight", (4, 2, 3, 3))])
    >>> layout.num_kernels, layout.num_weights, layout.block
    (8, 72, (3, 3))
    >>> layout = Layout([("linear.weight", (4, 2))], tile=(1, 3))
    >>> layout.num_kernels, layout.num_weights, layout.block
    (4, 8, (1, 3))
    """

    def __init__(
        self,
        layers: Sequence[tuple[str, tuple[int, ...]]],
        aliases: Mapping[str, tuple[str, ...]] | None = None,
        pointwise: Pointwise = "crop",
        tile: Size = 3,
    ) -> None:
        if not layers:
            raise LayoutError("there is no weight to predict; expected at least one layer.")
        if pointwise not in get_args(Pointwise):
            raise LayoutError(f"pointwise={pointwise!r}; expected {' or '.join(map(repr, get_args(Pointwise)))}.")
        try:
            self.tile = sides(tile)
        except ValueError as error:
            raise LayoutError(f"tile={tile}; {error}.") from error
        start, placed = 0, []
        for key, shape in layers:
            is_pointwise = math.prod(shape[2:]) == 1
            tiled = is_pointwise and (len(shape) == 2 or pointwise == "tile")
            placed.append(Layer(key, shape, start, self.tile if tiled else None, (aliases or {}).get(key, ())))
            start += placed[-1].kernels
        self.layers: tuple[Layer, ...] = tuple(placed)
        self.pointwise: Pointwise = pointwise
        self.num_kernels = start
        self.num_weights = sum(layer.weights for layer in placed)
        self.block: tuple[int, int] = (max(x.block[0] for x in placed), max(x.block[1] for x in placed))

    @classmethod
    def from_module(
        cls,
        net: nn.Module,
        layers: LayerPreset | LayerFilter = "all_convs",
        pointwise: Pointwise = "crop",
        tile: Size = 3,
    ) -> Self:
        """The layout of a network's weights, in module order.

        A weight that several modules share is one layer; it is selected if `layers` selects any of them.

        Args:
            net: The network.
            layers: The selection.
            pointwise: See the class.
            tile: See the class.

        Raises:
            LayoutError: If a pattern of `layers` matches no layer, no layer is selected, or a predicted weight is
                computed from other tensors or shares memory with another tensor of the network.
        """
        found = candidates(net, as_filter(layers).types)
        keys = select_layers(found, layers)
        require_replaceable(net, keys)
        names = names_of_weights(net)
        aliases = {key: names[key][1:] for key in keys}
        return cls([(key, found[key].shape) for key in keys], aliases, pointwise, tile)

    def table(self, state: Mapping[str, Tensor], block: tuple[int, int] | None = None) -> Tensor:
        """The table (N, K, K) of a state dict's kernels; entries outside a kernel's crop and padding are zero.

        Args:
            state: A state dict with every predicted weight.
            block: (Kh, Kw), by default the layout's.
        """
        block = block or self.block
        first = state[self.layers[0].key]
        table = first.new_zeros(self.num_kernels, *block)
        for layer in self.layers:
            rows, columns = layer.crop(block)
            table[layer.rows, rows, columns] = layer.blocks(state[layer.key].detach()).flatten(0, 1)
        return table

    def weights(self, table_NKK: Tensor) -> dict[str, Tensor]:
        """The state-dict entries of a table: key -> weight. The exact inverse of `table`.

        The table's kernels may be larger than the layout's; the weights are the center crops.
        """
        block = (table_NKK.shape[1], table_NKK.shape[2])
        entries = {}
        # One split: with slices, the backward pass would allocate a gradient of the table's size per layer.
        parts = table_NKK.split([layer.kernels for layer in self.layers])
        for layer, part in zip(self.layers, parts, strict=True):
            rows, columns = layer.crop(block)
            entries[layer.key] = layer.weight(part[:, rows, columns])
        return entries

    def with_kernels(self, entries: Mapping[str, Tensor], rows_S: Tensor, kernels_SKK: Tensor) -> dict[str, Tensor]:
        """A copy of state-dict entries in which some kernels are replaced; gradients flow to the new kernels.

        Args:
            entries: As returned by `weights`.
            rows_S: Rows of the table, in ascending order and without duplicates.
            kernels_SKK: The kernels of these rows.
        """
        block = (kernels_SKK.shape[1], kernels_SKK.shape[2])
        ends = torch.tensor([layer.rows.stop for layer in self.layers], device=rows_S.device)
        counts = torch.searchsorted(rows_S, ends).diff(prepend=ends.new_zeros(1)).tolist()
        replaced = {}
        for layer, rows, kernels in zip(self.layers, rows_S.split(counts), kernels_SKK.split(counts), strict=True):
            height, width = layer.crop(block)
            flat = layer.blocks(entries[layer.key]).flatten(0, 1)
            replaced[layer.key] = layer.weight(flat.index_copy(0, rows - layer.start, kernels[:, height, width]))
        return replaced

    def vector(self, entries: Mapping[str, Tensor]) -> Tensor:
        """All predicted weights of a state dict in one vector (W,)."""
        return torch.cat([entries[layer.key].flatten() for layer in self.layers])

    def masks(self, block: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """The entries of (K, K) kernels that are weights.

        Returns:
            The different masks (M, K, K), booleans, and the number of each row's mask (N,), int16.
        """
        parts, numbers, known = [], [], 0
        for layer in self.layers:
            masks, own = layer.masks(block)
            parts.append(masks)
            numbers.append(own + known)
            known += len(masks)
        distinct, merged = torch.cat(parts).unique(dim=0, return_inverse=True)
        return distinct, torch.cat([merged[own].short() for own in numbers])
