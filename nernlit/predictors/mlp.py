"""NeRN's predictor: a multilayer perceptron on the encoded address (arXiv 2212.13554; arXiv 2407.00356, section 2).

Shapes: N addresses, E length of the encoding of one index, V length of a learned vector of one index, H hidden width,
K x K kernel size, S heads.
"""

import math
from collections.abc import Sequence
from typing import Literal, final, get_args

import torch
from torch import Tensor, nn

from nernlit.errors import UsageError, require_at_least
from nernlit.predictors.base import Predictor
from nernlit.predictors.encoding import FourierEncoding
from nernlit.predictors.layer_strides import sets_of
from nernlit.predictors.vectors import AddressVectors, VectorShare
from nernlit.utilities.sides import Size

Heads = Literal["network", "stage"]


class _Sine(nn.Module):
    def forward(self, values: Tensor) -> Tensor:
        return values.sin()


class _SineLinear(nn.Linear):
    """A linear layer of a SIREN, with its initialization (Sitzmann et al., arXiv 2006.09661)."""

    def reset_parameters(self) -> None:
        super().reset_parameters()
        bound = math.sqrt(6 / self.in_features)
        nn.init.uniform_(self.weight, -bound, bound)


_ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU, "tanh": nn.Tanh, "sine": _Sine}


@final
class MLP(Predictor):
    """`depth` linear layers, 3E -> H -> ... -> H -> K*K, with an activation between them and PyTorch's initialization.

    With the defaults it has `240H + H + 3(H^2 + H) + 9H + 9` parameters (the paper's counts).

    The encodings of all indices are computed once, as constant tables; an address selects one row of each.

    Args:
        hidden: Hidden width H.
        depth: Number of linear layers, at least 2.
        activation: Activation between the layers. `sine` is a SIREN with its initialization and omega = 1; no larger
            omega is needed, because the encoding supplies the frequencies.
        kernel_size: Size of the predicted kernels: the side K of a square, or (height, width).
        num_frequencies: Frequencies of the encoding; 0 for no encoding, with `embedding`.
        base: Ratio of neighboring frequencies of the encoding.
        residual: Whether the input of each of the `depth - 2` layers H -> H, before its activation, is added to its
            output.
        heads: Whether the last layer is that of the whole network, or each stage has one of its own. A stage starts at
            each layer with more filters than all layers before it.
        embedding: Length V of learned embeddings of the layer, filter and channel index, concatenated to the encoding:
            the first layer has 3(E + V) inputs. 0 for none.
        embedding_share: Whether filter f has the same vector in all layers (`network`), or another one in each
            (`layer`); likewise channels.
        rank: Rank R of the first layer, whose matrix is then the product of two matrices, (H, R) and (R, 3(E + V)).
            0 for one matrix.

    >>> MLP(140).num_params, MLP(320).num_params
    (94229, 388169)
    """

    encoded_layer: Tensor
    encoded_filter: Tensor
    encoded_channel: Tensor
    head_of_layer: Tensor

    def __init__(
        self,
        hidden: int,
        depth: int = 5,
        activation: Literal["relu", "gelu", "silu", "tanh", "sine"] = "relu",
        kernel_size: Size = 3,
        num_frequencies: int = 40,
        base: float = 0.76,
        *,
        residual: bool = False,
        heads: Heads = "network",
        embedding: int = 0,
        embedding_share: VectorShare = "network",
        rank: int = 0,
    ) -> None:
        super().__init__(kernel_size)
        if hidden < 1 or depth < 2:
            raise UsageError(
                f"hidden={hidden}, depth={depth}; expected a width of at least 1 and a depth of at least 2."
            )
        for name, value, allowed in (
            ("activation", activation, tuple(_ACTIVATIONS)),
            ("heads", heads, get_args(Heads)),
            ("embedding_share", embedding_share, get_args(VectorShare)),
        ):
            if value not in allowed:
                raise UsageError(f"{name}={value!r}; expected one of {', '.join(allowed)}.")
        require_at_least(0, embedding=embedding, rank=rank)
        if residual and depth == 2:
            raise UsageError("residual=True has no effect with depth=2; pass a depth of at least 3.")
        if embedding_share != "network" and not embedding:
            raise UsageError(f"embedding_share={embedding_share!r} has no effect with embedding=0; set its length.")
        self.hidden, self.depth, self.activation = hidden, depth, activation
        self.num_frequencies, self.base = num_frequencies, base
        self.residual, self.heads, self.embedding, self.embedding_share = residual, heads, embedding, embedding_share
        self.rank = rank
        self.encoding = FourierEncoding(num_frequencies, base) if num_frequencies or not embedding else None
        self.vectors = AddressVectors(embedding, embedding_share) if embedding else None
        width = embedding + (self.encoding.width if self.encoding is not None else 0)
        self.first: nn.Module = self._linear(rank or 3 * width, hidden)
        if rank:
            self.first = nn.Sequential(nn.Linear(3 * width, rank, bias=False), self.first)
        layers: list[nn.Module] = []
        for _ in range(depth - 2):
            layers += [_ACTIVATIONS[activation](), self._linear(hidden, hidden)]
        layers += [_ACTIVATIONS[activation](), self._linear(hidden, math.prod(self.block))]
        self.rest = nn.Sequential(*layers)
        self._is_bound = False

    def _linear(self, inputs: int, outputs: int, device: torch.device | None = None) -> nn.Linear:
        return (_SineLinear if self.activation == "sine" else nn.Linear)(inputs, outputs, device=device)

    def bind(self, layers: Sequence[tuple[int, int]]) -> None:
        device = next(self.first.parameters()).device
        if self.encoding is not None:
            filters, channels = (max(counts) for counts in zip(*layers, strict=True))
            for name, count in (("layer", len(layers)), ("filter", filters), ("channel", channels)):
                self.set_constant(f"encoded_{name}", self.encoding.table(count).to(device))
        if self.vectors is not None:
            self.vectors.bind(layers, device)
        if self.heads == "stage":
            stages = sets_of(layers, "stage")
            self.set_constant("head_of_layer", torch.tensor(stages, device=device))
            self.rest[-1] = self._linear(self.hidden, (stages[-1] + 1) * math.prod(self.block), device)
        self._is_bound = True

    def forward(self, addresses_N3: Tensor) -> Tensor:
        if not self._is_bound:
            raise UsageError(
                "the MLP does not know the range of the addresses; call bind(layers) first, or use a Representation."
            )
        hidden_NH = self.first(self._inputs(addresses_N3))
        if self.residual:
            layers = list(self.rest)
            for activation, linear in zip(layers[:-2:2], layers[1:-2:2], strict=True):
                hidden_NH = hidden_NH + linear(activation(hidden_NH))
            flat: Tensor = layers[-1](layers[-2](hidden_NH))
        else:
            flat = self.rest(hidden_NH)
        if self.heads == "stage":
            outputs_NSD = flat.unflatten(1, (-1, math.prod(self.block)))
            head_N = self.head_of_layer[addresses_N3[:, 0]]
            flat = outputs_NSD.take_along_dim(head_N.view(-1, 1, 1), 1)
        return flat.reshape(-1, *self.block).to(torch.promote_types(flat.dtype, torch.float32))

    def _inputs(self, addresses_N3: Tensor) -> Tensor:
        """The encodings and the learned vectors of addresses, (N, 3(E + V))."""
        parts = []
        if self.encoding is not None:
            tables = (self.encoded_layer, self.encoded_filter, self.encoded_channel)
            dtype = next(self.first.parameters()).dtype
            parts = [table.to(dtype)[addresses_N3[:, i]] for i, table in enumerate(tables)]
        if self.vectors is not None:
            parts.append(self.vectors(addresses_N3))
        return torch.cat(parts, dim=1)
