"""Blocks: the 2-D pieces of one weight, each of which is one row of the kernel table.

A convolution with kernels larger than 1 gives its kernels. A `Linear` weight is a matrix and gives tiles of one size,
zero-padded at the right and lower edge. A 1x1 convolution gives its kernels of one number each, or tiles of its matrix.

Shapes: F x C blocks of h x w numbers each. F are filters or rows of tiles, C channels or columns of tiles.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

#: How a 1x1 convolution is divided: its kernels as center crops (NeRN's), or tiles of filters by channels.
Pointwise = Literal["crop", "tile"]


@dataclass(frozen=True)
class Layer:
    """One predicted weight.

    Attributes:
        key: Its state-dict key.
        shape: (O, I) of a `Linear`; (O, I, ...) with one to three sides of a kernel of a convolution. For transposed
            convolutions the first dimension is the input channels.
        start: Its first row in the table.
        tile: (h, w) of its tiles; None if its blocks are its kernels.
        aliases: Further state-dict keys of the same weight, which get the same prediction.
    """

    key: str
    shape: tuple[int, ...]
    start: int
    tile: tuple[int, int] | None = None
    aliases: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The module's name; for a weight that is not named `weight`, its key."""
        return layer_name(self.key)

    @property
    def block(self) -> tuple[int, int]:
        """(h, w) of a block. A 1-D kernel has one row; a 3-D kernel is a stack of 2-D ones."""
        if self.tile is not None:
            return self.tile
        return (1, self.shape[2]) if len(self.shape) == 3 else (self.shape[-2], self.shape[-1])

    @property
    def grid(self) -> tuple[int, int]:
        """(F, C): the number of blocks in both directions. The slices of 3-D kernels count as channels."""
        if self.tile is not None:
            height, width = self.tile
            return -(-self.shape[0] // height), -(-math.prod(self.shape[1:]) // width)  # rounded up
        return self.shape[0], math.prod(self.shape[1:]) // math.prod(self.block)

    @property
    def kernels(self) -> int:
        """Its number of blocks, which is its number of rows in the table."""
        return math.prod(self.grid)

    @property
    def weights(self) -> int:
        """Its number of weights; padding is not counted."""
        return math.prod(self.shape)

    @property
    def rows(self) -> slice:
        return slice(self.start, self.start + self.kernels)

    def crop(self, block: tuple[int, int]) -> tuple[slice, slice]:
        """The rows and columns of a larger block that hold one of this layer: its center, rounded up and left."""
        height, width = self.block
        top, left = (block[0] - height) // 2, (block[1] - width) // 2
        return slice(top, top + height), slice(left, left + width)

    def blocks(self, weight: Tensor) -> Tensor:
        """The blocks (F, C, h, w) of a weight; the padding of tiles is zero."""
        if self.tile is None:
            return weight.reshape(*self.grid, *self.block)
        (rows, columns), (height, width) = self.grid, self.tile
        matrix = weight.reshape(len(weight), -1)
        padding = (0, columns * width - matrix.shape[1], 0, rows * height - matrix.shape[0])
        return pad(matrix, padding).reshape(rows, height, columns, width).transpose(1, 2)

    def weight(self, blocks_NHW: Tensor) -> Tensor:
        """The weight of its blocks (F * C, h, w), row by row. The exact inverse of `blocks`."""
        if self.tile is None:
            return blocks_NHW.reshape(self.shape)
        (rows, columns), (height, width) = self.grid, self.tile
        tiles = blocks_NHW.reshape(rows, columns, height, width).transpose(1, 2)
        matrix = tiles.reshape(rows * height, columns * width)
        return matrix[: self.shape[0], : math.prod(self.shape[1:])].reshape(self.shape)

    def masks(self, block: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """The entries of larger blocks (Kh, Kw) that are weights.

        Returns:
            The distinct masks (M, Kh, Kw), bool, and the index of each block's mask (F * C,), int64.
        """
        rows, columns = self.grid
        masks = torch.zeros(4, *block, dtype=torch.bool)
        for number in range(4):
            masks[number, *self.crop(block)] = True
        if self.tile is None:
            return masks[:1], torch.zeros(rows * columns, dtype=torch.int64)
        top, left = (part.start for part in self.crop(block))
        # Mask index: 0 inner tile, 1 last row, 2 last column, 3 bottom right corner.
        masks[1::2, self.shape[0] - (rows - 1) * self.tile[0] + top :] = False
        masks[2:, :, math.prod(self.shape[1:]) - (columns - 1) * self.tile[1] + left :] = False
        last_row = torch.arange(rows) == rows - 1
        last_column = torch.arange(columns) == columns - 1
        return masks, (last_row[:, None] + 2 * last_column).flatten()


def layer_name(key: str) -> str:
    """The name of the layer of a state-dict key.

    >>> layer_name("layer1.conv.weight"), layer_name("attention.in_proj_weight"), layer_name("weight")
    ('layer1.conv', 'attention.in_proj_weight', '')
    """
    return "" if key == "weight" else key.removesuffix(".weight")
