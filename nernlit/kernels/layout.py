"""The layout: convolution weights <-> one table of kernels <-> state-dict entries.

Shapes: N kernels in all, K side of the largest kernel, O filters (output channels), I channels a filter sees
(input channels / groups), kh x kw side of a layer's own kernels, L layers.

A row of the table is one 2-D kernel `weight[f, c]`; rows run over layers, then filters, then channels. A kernel smaller
than K x K is the centre crop of its row (NeRN, arXiv 2212.13554, section 3), so that one predictor serves all layers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch import Tensor, nn

from nernlit.errors import LayoutError

LayerPreset = Literal["all_convs", "stages_3x3"]


@dataclass(frozen=True)
class LayerFilter:
    """Which convolutions are predicted; the others are kept as they are.

    Args:
        include: Shell patterns of module names, for example `layer1.*`; a layer is taken if any of them matches.
        exclude: Shell patterns of module names that are left out again.
        kernel_sizes: Only layers whose larger kernel side is listed; None takes every size.
    """

    include: list[str] = field(default_factory=lambda: ["*"])
    exclude: list[str] = field(default_factory=list)
    kernel_sizes: list[int] | None = None

    def takes(self, name: str, conv: nn.Conv2d) -> bool:
        """Whether the convolution `conv`, found under the module name `name`, is predicted."""
        if self.kernel_sizes is not None and max(conv.kernel_size) not in self.kernel_sizes:
            return False
        return _matches(name, self.include) and not _matches(name, self.exclude)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


#: The paper's two choices: every convolution (CIFAR, STL), the 3x3 ones of the four stages (ImageNet ResNets).
PRESETS: dict[LayerPreset, LayerFilter] = {
    "all_convs": LayerFilter(),
    "stages_3x3": LayerFilter(include=["layer[1-4].*"], kernel_sizes=[3]),
}


@dataclass(frozen=True)
class ConvLayer:
    """One predicted layer: its state-dict key, its weight's shape (O, I, kh, kw), and its first row in the table."""

    key: str
    shape: tuple[int, int, int, int]
    start: int

    @property
    def kernels(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def weights(self) -> int:
        return self.kernels * self.shape[2] * self.shape[3]

    @property
    def rows(self) -> slice:
        return slice(self.start, self.start + self.kernels)

    def crop(self, kernel_size: int) -> tuple[slice, slice]:
        """Rows and columns of a (K, K) kernel that this layer's own kernel takes: the centre, rounded up-left."""
        _, _, height, width = self.shape
        top, left = (kernel_size - height) // 2, (kernel_size - width) // 2
        return slice(top, top + height), slice(left, left + width)


class Layout:
    """Where every predicted kernel stands in the table.

    Args:
        layers: The predicted layers as (state-dict key, weight shape (O, I, kh, kw)), in the network's order.

    Raises:
        LayoutError: If there is no layer.

    >>> layout = Layout([("conv.weight", (4, 2, 3, 3))])
    >>> layout.num_kernels, layout.num_weights, layout.kernel_size
    (8, 72, 3)
    """

    def __init__(self, layers: Sequence[tuple[str, tuple[int, int, int, int]]]) -> None:
        if not layers:
            raise LayoutError("no convolution is left to predict; expected at least one layer.")
        start, placed = 0, []
        for key, shape in layers:
            placed.append(ConvLayer(key, shape, start))
            start += placed[-1].kernels
        self.layers: tuple[ConvLayer, ...] = tuple(placed)
        self.num_kernels = start
        self.num_weights = sum(layer.weights for layer in placed)
        self.kernel_size = max(max(layer.shape[2:]) for layer in placed)

    @classmethod
    def of(cls, net: nn.Module, layers: LayerPreset | LayerFilter = "all_convs") -> "Layout":
        """The layout of a network's `Conv2d` weights (grouped and depthwise ones too), in module order.

        Raises:
            LayoutError: If no convolution matches; the message lists some names that exist.
        """
        rule = layers if isinstance(layers, LayerFilter) else PRESETS[layers]
        convs = {name: m for name, m in net.named_modules() if isinstance(m, nn.Conv2d)}
        taken = [
            (f"{name}.weight", (m.weight.shape[0], m.weight.shape[1], m.weight.shape[2], m.weight.shape[3]))
            for name, m in convs.items()
            if rule.takes(name, m)
        ]
        if not taken:
            some = ", ".join(list(convs)[:5]) or "none"
            raise LayoutError(
                f"no Conv2d of {type(net).__name__} matches layers={layers!r}; it has {len(convs)} (first: {some}). "
                "Widen --model.representation.layers."
            )
        return cls(taken)

    def table(self, state: Mapping[str, Tensor], kernel_size: int | None = None) -> Tensor:
        """The table (N, K, K) of a state dict's kernels; what lies outside a smaller kernel's crop is zero.

        Args:
            state: Holds every predicted weight.
            kernel_size: K, by default the largest kernel's side.
        """
        size = kernel_size or self.kernel_size
        first = state[self.layers[0].key]
        table = first.new_zeros(self.num_kernels, size, size)
        for layer in self.layers:
            rows, columns = layer.crop(size)
            table[layer.rows, rows, columns] = state[layer.key].detach().flatten(0, 1)
        return table

    def weights(self, table_NKK: Tensor) -> dict[str, Tensor]:
        """The state-dict entries that a table holds: key -> (O, I, kh, kw). Inverse of `table`, exact to the bit.

        The table may be larger than the layout's K; the entries are the centre crops.
        """
        size = table_NKK.shape[-1]
        entries = {}
        # One split: slices of the whole table would have gradients as large as the table, one a layer.
        parts = table_NKK.split([layer.kernels for layer in self.layers])
        for layer, part in zip(self.layers, parts, strict=True):
            rows, columns = layer.crop(size)
            entries[layer.key] = part[:, rows, columns].reshape(layer.shape)
        return entries

    def with_kernels(self, entries: Mapping[str, Tensor], rows_S: Tensor, kernels_SKK: Tensor) -> dict[str, Tensor]:
        """State-dict entries in which some kernels are replaced by these, which keep their gradients.

        Args:
            entries: As `weights` returns them.
            rows_S: Rows of the table, in ascending order and each once.
            kernels_SKK: A kernel for each of these rows.
        """
        ends = torch.tensor([layer.rows.stop for layer in self.layers], device=rows_S.device)
        counts = torch.searchsorted(rows_S, ends).diff(prepend=ends.new_zeros(1)).tolist()
        replaced = {}
        for layer, rows, kernels in zip(self.layers, rows_S.split(counts), kernels_SKK.split(counts), strict=True):
            height, width = layer.crop(kernels_SKK.shape[-1])
            flat = entries[layer.key].flatten(0, 1)
            replaced[layer.key] = flat.index_copy(0, rows - layer.start, kernels[:, height, width]).view(layer.shape)
        return replaced

    def vector(self, entries: Mapping[str, Tensor]) -> Tensor:
        """All predicted weights of a state dict in one vector (W,)."""
        return torch.cat([entries[layer.key].flatten() for layer in self.layers])

    def layer_masks(self, kernel_size: int) -> Tensor:
        """(L, K, K) booleans: which entries of a (K, K) kernel are weights of the layer."""
        masks = torch.zeros(len(self.layers), kernel_size, kernel_size, dtype=torch.bool)
        for mask, layer in zip(masks, self.layers, strict=True):
            mask[layer.crop(kernel_size)] = True
        return masks
