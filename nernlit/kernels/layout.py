"""The layout: convolution weights <-> one table of kernels <-> state-dict entries.

Shapes: N kernels in total, K side of the largest kernel, O filters (output channels), I channels per filter (input
channels / groups), kh x kw kernel size of a layer, L layers.

Each row of the table is one 2-D kernel `weight[f, c]`. Rows are sorted by layer, then filter, then channel. A kernel
smaller than K x K is the center crop of its row (NeRN, arXiv 2212.13554, section 3), so one predictor serves all
layers.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from nernlit.errors import LayoutError
from nernlit.kernels.layers import LayerFilter, LayerPreset, chosen
from nernlit.utilities.sharing import names_of_weights, overlap, unnamed_tensors


@dataclass(frozen=True)
class ConvLayer:
    """One predicted weight.

    Attributes:
        key: Its state-dict key.
        shape: (O, I, kh, kw).
        start: Its first row in the table.
        aliases: Further state-dict keys of the same weight, which get the same prediction.
    """

    key: str
    shape: tuple[int, int, int, int]
    start: int
    aliases: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The module's name."""
        return self.key.removesuffix("weight").removesuffix(".")

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
        """The rows and columns of a (K, K) kernel that hold this layer's kernel: its center, rounded up and left."""
        _, _, height, width = self.shape
        top, left = (kernel_size - height) // 2, (kernel_size - width) // 2
        return slice(top, top + height), slice(left, left + width)


class Layout:
    """Maps the predicted kernels to rows of the kernel table.

    Args:
        layers: The predicted weights as (state-dict key, shape (O, I, kh, kw)), in the network's order.
        aliases: For some of these keys, further keys of the same weight.

    Raises:
        LayoutError: If there is no layer.

    >>> layout = Layout([("conv.weight", (4, 2, 3, 3))])
    >>> layout.num_kernels, layout.num_weights, layout.kernel_size
    (8, 72, 3)
    """

    def __init__(
        self,
        layers: Sequence[tuple[str, tuple[int, int, int, int]]],
        aliases: Mapping[str, tuple[str, ...]] | None = None,
    ) -> None:
        if not layers:
            raise LayoutError("there is no convolution to predict; expected at least one layer.")
        start, placed = 0, []
        for key, shape in layers:
            placed.append(ConvLayer(key, shape, start, (aliases or {}).get(key, ())))
            start += placed[-1].kernels
        self.layers: tuple[ConvLayer, ...] = tuple(placed)
        self.num_kernels = start
        self.num_weights = sum(layer.weights for layer in placed)
        self.kernel_size = max(max(layer.shape[2:]) for layer in placed)

    @classmethod
    def of(cls, net: nn.Module, layers: LayerPreset | LayerFilter = "all_convs") -> Self:
        """The layout of a network's `Conv2d` weights (grouped and depthwise ones too), in module order.

        A weight that several convolutions share is one layer; it is selected if `layers` selects any of them.

        Raises:
            LayoutError: If a pattern of `layers` matches no convolution, no convolution is selected, or a predicted
                weight shares memory with another tensor of the network.
        """
        state, names = net.state_dict(keep_vars=True), names_of_weights(net)
        convs: dict[str, list[str]] = defaultdict(list)
        for name, module in net.named_modules(remove_duplicate=False):
            if isinstance(module, nn.Conv2d):
                key = f"{name}.weight".removeprefix(".")
                if key not in names:
                    raise LayoutError(
                        f"the convolution {name!r} has no weight in the state dict but computes it from other tensors "
                        "(weight_norm, spectral_norm, pruning); make it permanent first, for example with "
                        "torch.nn.utils.parametrize.remove_parametrizations."
                    )
                convs[names[key][0]].append(name)
        keys = chosen(convs, {key: max(state[key].shape[2:]) for key in convs}, layers)
        unnamed = list(unnamed_tensors(net))
        for key in keys:
            views = [k for k, v in state.items() if k not in names[key] and k in names and overlap(state[key], v)]
            if views:
                raise LayoutError(
                    f"{key!r} shares memory with {views[0]!r}, which is another view of it, so it cannot be predicted "
                    "while the other tensor is kept. Copy one of the two tensors (`.clone()`), or exclude the layer "
                    "(--model.representation.layers)."
                )
            held = [name for name, value in unnamed if overlap(state[key], value)]
            if held:
                raise LayoutError(
                    f"{held[0]!r} refers to the weight {key!r} without being a parameter, so a predicted weight would "
                    "not replace it there. Read the weight from its module where it is used, or exclude the layer "
                    "(--model.representation.layers)."
                )
        return cls([(key, tuple(state[key].shape)) for key in keys], {key: names[key][1:] for key in keys})

    def table(self, state: Mapping[str, Tensor], kernel_size: int | None = None) -> Tensor:
        """The table (N, K, K) of a state dict's kernels; entries outside a smaller kernel's crop are zero.

        Args:
            state: A state dict with every predicted weight.
            kernel_size: K, by default the side of the largest kernel.
        """
        size = kernel_size or self.kernel_size
        first = state[self.layers[0].key]
        table = first.new_zeros(self.num_kernels, size, size)
        for layer in self.layers:
            rows, columns = layer.crop(size)
            table[layer.rows, rows, columns] = state[layer.key].detach().flatten(0, 1)
        return table

    def weights(self, table_NKK: Tensor) -> dict[str, Tensor]:
        """The state-dict entries of a table: key -> weight (O, I, kh, kw). The exact inverse of `table`.

        The table's K may be larger than the layout's; the weights are the center crops.
        """
        size = table_NKK.shape[-1]
        entries = {}
        # One split: with slices, the backward pass would allocate a gradient of the table's size per layer.
        parts = table_NKK.split([layer.kernels for layer in self.layers])
        for layer, part in zip(self.layers, parts, strict=True):
            rows, columns = layer.crop(size)
            entries[layer.key] = part[:, rows, columns].reshape(layer.shape)
        return entries

    def with_kernels(self, entries: Mapping[str, Tensor], rows_S: Tensor, kernels_SKK: Tensor) -> dict[str, Tensor]:
        """A copy of state-dict entries in which some kernels are replaced; gradients flow to the new kernels.

        Args:
            entries: As returned by `weights`.
            rows_S: Rows of the table, in ascending order and without duplicates.
            kernels_SKK: The kernels of these rows.
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
        """(L, K, K) booleans: the entries of a (K, K) kernel that are weights of each layer."""
        masks = torch.zeros(len(self.layers), kernel_size, kernel_size, dtype=torch.bool)
        for mask, layer in zip(masks, self.layers, strict=True):
            mask[layer.crop(kernel_size)] = True
        return masks
