"""NeRN's predictor: a multilayer perceptron on the encoded address (arXiv 2212.13554; arXiv 2407.00356, section 2).

Shapes: N addresses, E length of the encoding of one index (the input has 3E features), H hidden width, K x K
kernel size.
"""

import math
from collections.abc import Sequence
from typing import Literal, final

import torch
from torch import Tensor, nn

from nernlit.errors import UsageError
from nernlit.predictors.base import Predictor
from nernlit.predictors.encoding import FourierEncoding
from nernlit.utilities.sides import Size

_ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU, "tanh": nn.Tanh}


@final
class MLP(Predictor):
    """`depth` linear layers, 3E -> H -> ... -> H -> K*K, with an activation between them and PyTorch's initialization.

    With the defaults it has `240H + H + 3(H^2 + H) + 9H + 9` parameters (the paper's counts).

    The encodings of all indices are computed once, as constant tables; an address selects one row of each.

    Args:
        hidden: Hidden width H.
        depth: Number of linear layers, at least 2.
        activation: Activation between the layers.
        kernel_size: Size of the predicted kernels: the side K of a square, or (height, width).
        num_frequencies: Frequencies of the encoding.
        base: Ratio of neighboring frequencies of the encoding.

    >>> MLP(140).num_params, MLP(320).num_params
    (94229, 388169)
    """

    encoded_layer: Tensor
    encoded_filter: Tensor
    encoded_channel: Tensor

    def __init__(
        self,
        hidden: int,
        depth: int = 5,
        activation: Literal["relu", "gelu", "silu", "tanh"] = "relu",
        kernel_size: Size = 3,
        num_frequencies: int = 40,
        base: float = 0.76,
    ) -> None:
        super().__init__(kernel_size)
        if hidden < 1 or depth < 2:
            raise UsageError(
                f"hidden={hidden}, depth={depth}; expected a width of at least 1 and a depth of at least 2."
            )
        if activation not in _ACTIVATIONS:
            raise UsageError(f"activation={activation!r}; expected one of {', '.join(_ACTIVATIONS)}.")
        self.hidden, self.depth, self.activation = hidden, depth, activation
        self.num_frequencies, self.base = num_frequencies, base
        self.encoding = FourierEncoding(num_frequencies, base)
        self.first = nn.Linear(3 * self.encoding.width, hidden)
        layers: list[nn.Module] = []
        for _ in range(depth - 2):
            layers += [_ACTIVATIONS[activation](), nn.Linear(hidden, hidden)]
        layers += [_ACTIVATIONS[activation](), nn.Linear(hidden, math.prod(self.block))]
        self.rest = nn.Sequential(*layers)

    def bind(self, layers: Sequence[tuple[int, int]]) -> None:
        filters, channels = (max(counts) for counts in zip(*layers, strict=True))
        for name, count in (("layer", len(layers)), ("filter", filters), ("channel", channels)):
            table = self.encoding.table(count).to(self.first.weight.device)
            self.set_constant(f"encoded_{name}", table)

    def forward(self, addresses_N3: Tensor) -> Tensor:
        if not hasattr(self, "encoded_layer"):
            raise UsageError(
                "the MLP does not know the range of the addresses; call bind(layers) first, or use a Representation."
            )
        tables = (self.encoded_layer, self.encoded_filter, self.encoded_channel)
        dtype = self.first.weight.dtype
        encoded_N3E = torch.cat([table.to(dtype)[addresses_N3[:, i]] for i, table in enumerate(tables)], dim=1)
        flat: Tensor = self.rest(self.first(encoded_N3E))
        return flat.view(-1, *self.block).to(torch.promote_types(flat.dtype, torch.float32))
