"""Additive quantization as a predictor (as in arXiv 2111.10320): a kernel is a sum of codewords.

Shapes: N addresses, R kernels of the representation, K x K their size, D = K * K, M codebooks, C codewords of each, S
sets of codebooks (one, or one per stage or layer).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from nernlit.errors import CheckpointError, UsageError, require_at_least, require_one_of, require_positive
from nernlit.predictors.additive import additive_codes, total_work
from nernlit.predictors.base import Predictor
from nernlit.predictors.codes import decode_codes, encode_codes, pack_codes, packed_bytes, unpack_codes
from nernlit.predictors.layer_strides import Share, flat_index, layer_strides, sets_of
from nernlit.predictors.moves import CodeMoves
from nernlit.predictors.scales import Scale, Scales
from nernlit.storage.entropy import Part
from nernlit.utilities.progress import progress
from nernlit.utilities.sides import Size

#: State-dict key of the packed codes (`nn.Module.get_extra_state`).
_PACKED = "_extra_state"


@final
class Codebooks(Predictor):
    """A kernel is the sum of one codeword of each codebook, times a scale.

    A new representation computes codes, codewords and scales from the original's kernels. Training changes codewords
    and scales, and with `move` also codes. A kernel needs `codebooks * bits` bits, which are no parameters:
    `num_params` and `Sizes.cr_paper` do not count them, `Sizes.code_bits` and `Sizes.cr_file` do. A .nern file stores
    them entropy-coded. `Progressive` starts its trials with random codewords, because they have to differ, and keeps
    all codes.

    Args:
        codebooks: Number of codebooks M.
        bits: Bits of a code; a codebook has C = 2^bits codewords. 1 to 16.
        share: Which kernels have the same codebooks: those of the whole network, of a stage, or of a layer. A stage
            starts at each layer with more filters than all layers before it; in a ResNet18 these are its stages.
        scale: Which kernels have the same scale: `none` (the scale is 1), those of a layer, or of a filter.
        kernel_size: Size of the predicted kernels: the side of a square, or (height, width). A layer with smaller
            kernels uses their center crop.
        iterations: Iterations of k-means and of the sweeps that follow it; more are slower and give a smaller error.
        beam: Width of the beam search; likewise.
        sample: Number of kernels, chosen at random, that the codebooks of larger networks are found on; at least C.
        seed: Seed of k-means.
        move: Largest share of the kernels whose codes change in a training step; 0 keeps all codes. See `CodeMoves`.
        move_rate: Step size of the accumulated update of a kernel at the highest learning rate, in units of its scale.
            Too large is worse than too small: noise then changes codes.
        price: Weight of the code length (bits) in the cost that chooses codes, relative to the kernels' mean power.
            It favors frequent codes, which take fewer bits in a .nern file. Use more codewords with it. For b
            bits per weight, 2 log(2) / D * 4^-b is about right.

    >>> codebooks = Codebooks(codebooks=2, bits=6)
    >>> codebooks.bind([(16, 3), (16, 16)])
    >>> codebooks.num_params, codebooks.code_bits  # 2 * 64 * 9, (48 + 256) * 2 * 6
    (1152, 3648)
    """

    layer_strides: Tensor
    offsets: Tensor
    sets: Tensor
    codes: Tensor
    packed: Tensor

    def __init__(
        self,
        codebooks: int,
        bits: int,
        share: Share = "network",
        scale: Scale = "none",
        kernel_size: Size = 3,
        iterations: int = 40,
        beam: int = 16,
        sample: int = 2**17,
        seed: int = 0,
        move: float = 0.0,
        move_rate: float = 0.015,
        price: float = 0.0,
    ) -> None:
        super().__init__(kernel_size)
        if codebooks < 1 or not 1 <= bits <= 16:
            raise UsageError(f"codebooks={codebooks}, bits={bits}; expected at least one codebook, and 1 to 16 bits.")
        if iterations < 1 or beam < 1:
            raise UsageError(f"iterations={iterations}, beam={beam}; expected at least 1 of both.")
        if sample < 2**bits:
            raise UsageError(f"sample={sample}; expected at least the number of codewords, 2^{bits} = {2**bits}.")
        require_one_of(Share, share=share)
        self.codebooks, self.bits, self.share, self.scale = codebooks, bits, share, scale
        if not 0 <= move <= 1:
            raise UsageError(f"move={move}; expected a share of the kernels, between 0 and 1.")
        require_positive(move_rate=move_rate)
        require_at_least(0, price=price)
        self.iterations, self.beam, self.sample, self.seed = iterations, beam, sample, seed
        self.move, self.move_rate, self.price = move, move_rate, price
        self.scales = Scales(scale)
        self.moves = CodeMoves(move, move_rate, price) if move else None

    def bind(self, layers: Sequence[tuple[int, int]]) -> None:
        self.kernels_of_layers = [filters * channels for filters, channels in layers]
        kernels = sum(self.kernels_of_layers)
        self.set_constant("layer_strides", layer_strides(layers))
        self.set_constant("offsets", torch.arange(self.codebooks) * 2**self.bits)
        self.set_constant("codes", torch.zeros(kernels, self.codebooks, dtype=torch.int32))
        self.set_constant("packed", torch.zeros(packed_bytes(kernels * self.codebooks, self.bits), dtype=torch.uint8))
        self._is_packed = True
        sets = sets_of(layers, self.share)
        self.set_constant("sets", torch.tensor(sets))
        self.codewords = nn.Parameter(torch.empty(sets[-1] + 1, self.codebooks, 2**self.bits, math.prod(self.block)))
        self.scales.bind(layers)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all codewords from a normal distribution; scales become 1. The codes do not change."""
        nn.init.normal_(self.codewords, std=self.codebooks**-0.5)
        self.scales.reset_parameters()

    @property
    def is_fitted(self) -> bool:
        return True

    def quantized_parts(self) -> dict[str, list[Part]]:
        """The codewords, which are kernels; the rows are the sets."""
        return {"codewords": [(len(self.codewords), self.codebooks * 2**self.bits, *self.block)]}

    @property
    def code_bits(self) -> int:
        return self.codes.numel() * self.bits

    @torch.no_grad()
    def fit(self, blocks_NKK: Tensor, addresses_N3: Tensor, weights_NKK: Tensor) -> None:
        blocks_ND, weights_ND = blocks_NKK.flatten(1), weights_NKK.flatten(1)
        if (weights_ND == weights_ND[:, :1]).all():
            weights_ND = weights_ND[:, :1]  # (N, 1) saves memory: all entries of a kernel have the same weight
        else:
            blocks_ND = blocks_ND.where(weights_ND > 0, 0)
        if self.scale != "none":
            self.scales.fit(blocks_ND, addresses_N3, weights_ND)
            scale_N1 = self.scales(addresses_N3)[:, None]
            blocks_ND, weights_ND = blocks_ND / scale_N1, weights_ND * scale_N1.square()
        set_N = self.sets[addresses_N3[:, 0].long()]
        codes_NM = torch.zeros_like(self.codes)
        row_N = flat_index(self.layer_strides, addresses_N3)
        generator = torch.Generator().manual_seed(self.seed)
        weights_ND = weights_ND.expand_as(blocks_ND)
        sizes = torch.bincount(set_N).tolist()
        total = sum(total_work(size, self.codebooks, self.iterations, self.beam, self.sample) for size in sizes)
        with progress(f"codes of {len(blocks_ND):,} kernels", total) as advance:
            for number, codewords_MCD in enumerate(self.codewords):
                own_N = set_N == number if len(self.codewords) > 1 else slice(None)  # a slice copies nothing
                options = self.codebooks, 2**self.bits, self.iterations, self.beam, self.sample, generator, advance
                found_MCD, found_MN = additive_codes(blocks_ND[own_N], weights_ND[own_N], *options, self.price)
                codewords_MCD.copy_(found_MCD)
                codes_NM[row_N[own_N]] = found_MN.T.to(codes_NM)
        self.set_constant("codes", codes_NM)
        self._pack()

    def _pack(self) -> None:
        self.set_constant("packed", pack_codes(self.codes, self.bits).to(self.codes.device))
        self._is_packed = True

    def forward(self, addresses_N3: Tensor) -> Tensor:
        if not hasattr(self, "codewords"):
            raise UsageError(
                "the Codebooks do not know their addresses; call bind(layers) first, or use a Representation."
            )
        row_N = flat_index(self.layer_strides, addresses_N3)
        place_NM = self.codes[row_N] + self.offsets
        if len(self.codewords) > 1:
            place_NM = place_NM + self.sets[addresses_N3[:, :1].long()] * (self.codebooks * 2**self.bits)
        flat_ND = embedding(place_NM, self.codewords.flatten(0, 2)).sum(1)
        if self.moves is not None and self.training and flat_ND.requires_grad:
            self.moves.watch(flat_ND, row_N, len(self.codes))
        if self.scale != "none":
            flat_ND = flat_ND * self.scales(addresses_N3)[:, None]
        kernels_NKK = flat_ND.view(-1, *self.block)
        return kernels_NKK.to(torch.promote_types(flat_ND.dtype, torch.float32))

    @property
    def changes_after_steps(self) -> bool:
        return self.moves is not None

    @torch.no_grad()
    def after_step(self, relative_rate: float, mean: Callable[[Tensor], Tensor] = torch.positive) -> dict[str, float]:
        if self.moves is None:
            return {}
        first_L, count = self.layer_strides[:, 0].contiguous(), len(self.codes)
        layer_R = torch.bucketize(torch.arange(count, device=first_L.device), first_L, right=True) - 1
        moved = self.moves.step(self.codes, self.codewords, self.sets[layer_R], relative_rate, mean)
        self._is_packed = self._is_packed and not moved
        return {"codes_moved": moved / count}

    def training_state(self) -> dict[str, Tensor]:
        return {} if self.moves is None else self.moves.state()

    def load_training_state(self, state: Mapping[str, Tensor]) -> None:
        if self.moves is not None:
            self.moves.load_state(state, self.codes.device)

    def stored(self) -> dict[str, Tensor]:
        """The state dict, with codes as an entropy code."""
        state = {name: value for name, value in self.state_dict().items() if name != _PACKED}
        return {**state, "codes": encode_codes(self.codes, self.kernels_of_layers)}

    def stored_shapes(self) -> dict[str, torch.Size | None]:
        shapes: dict[str, torch.Size | None] = {n: v.shape for n, v in self.state_dict().items() if n != _PACKED}
        return {**shapes, "codes": None}

    def load_stored(self, tensors: Mapping[str, Tensor]) -> None:
        codes_NM = decode_codes(tensors["codes"], self.kernels_of_layers, self.codebooks, self.bits)
        state = {name: value for name, value in tensors.items() if name != "codes"}
        self.load_state_dict({**state, _PACKED: pack_codes(codes_NM, self.bits)})

    def get_extra_state(self) -> Tensor:
        """The packed codes."""
        if not self._is_packed:
            self._pack()
        return self.packed

    def set_extra_state(self, state: Any) -> None:
        """Load packed codes.

        Raises:
            CheckpointError: If they are not as many bytes as the codes need.
        """
        if not isinstance(state, Tensor) or state.dtype != torch.uint8 or state.shape != self.packed.shape:
            found = (
                f"{state.dtype} of shape {tuple(state.shape)}" if isinstance(state, Tensor) else type(state).__name__
            )
            raise CheckpointError(f"the codes are {found}; expected uint8 of shape {tuple(self.packed.shape)}.")
        device = self.codes.device
        self.set_constant("codes", unpack_codes(state, self.bits, *self.codes.shape).to(device))
        self.set_constant("packed", state.to(device, copy=True))
        self._is_packed = True
