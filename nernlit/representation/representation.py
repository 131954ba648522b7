"""The representation: an original, its layout and order, and a predictor, as one plain `nn.Module`.

Schemes train it, files store it, analyses read it; nothing here needs Lightning.

Shapes: N kernels, K x K size of the predicted kernels (at least the layout's), B images, C classes.
"""

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self, final

import torch
from torch import Tensor, nn

from nernlit.coding import (
    KeptForm,
    NernFile,
    bind,
    predicted_kernels,
    predicted_weights,
    require_kernel_size,
    unreadable,
)
from nernlit.errors import CheckpointError, LayoutError, UsageError
from nernlit.kernels import (
    LayerFilter,
    LayerPreset,
    Layout,
    OrderName,
    Pointwise,
    addresses,
    pack_order,
    unpack_order,
)
from nernlit.originals import Original, decoded_original, description, with_statistics, without_statistics
from nernlit.predictors import Predictor, Quantize, Quantized
from nernlit.representation.fitting import predictors_are_fitted
from nernlit.representation.hub import WithPretrained
from nernlit.representation.learned import LearnedEntries
from nernlit.representation.sizes import Sizes
from nernlit.representation.state import require_compatible
from nernlit.representation.tuned import TUNED_RATE, Tuned, TuneKept, tuned
from nernlit.utilities.constants import WithConstants
from nernlit.utilities.modes import plain_modes
from nernlit.utilities.sharing import names_of_weights
from nernlit.utilities.sides import shortest
from nernlit.utilities.text import abbreviated

#: Rows of the table of kernels that are converted to float64 at once.
_PART = 2**20


@final
class Representation(WithConstants, WithPretrained):
    """A network whose weights are computed by a predictor, kernel by kernel.

    Its `state_dict` holds the predictor and, as extra state, the specification, the scale, the packed order and the
    original's fingerprint; never the original.

    A new representation calls its predictor's `fit` with the original's kernels.

    Args:
        original: The network; it is frozen and stays in evaluation mode.
        predictor: Maps addresses to kernels.
        layers: The layers whose weights are predicted: a preset or a `LayerFilter`.
        order: The order of the kernels: `in_filter` (the paper's for CIFAR and STL), `cross_filter` (ImageNet) or
            `none`.
        standardize: Whether the predictor works in units of the weights' root mean square; NeRN uses False.
        pointwise: How 1x1 convolutions are divided: `crop`, one predicted kernel for each weight, of which the center
            is used (NeRN's), or `tile`, as linear weights: tiles of filters by channels that are as large as predicted
            kernels.
        quantize: How the predictor is quantized (it is wrapped in a `Quantized`); None for no quantization.
        tune_kept: Tensors of the network that are trained with the predictor, though they are not predicted: `none`,
            `affine` (biases, and the scales and shifts of normalization layers) or `all`. Files hold these tensors in
            any case; they grow only by tensors whose numbers were all equal before.
        keep_zeros: Whether predicted weights that are 0 in the original stay 0, as in a pruned network. The predictor
            does not learn them then, and files hold their positions.

    Raises:
        LayoutError: If no layer matches, the predictor's kernels are smaller than a layer's, or the layers' weights are
            not finite or all zero; or with `keep_zeros`, none is zero.
        UsageError: If the predictor does not store its constructor's arguments.
    """

    original: Original
    scale: Tensor
    addresses: Tensor
    target: Tensor
    learned: LearnedEntries
    #: Whether the predictor is still in its initial state: neither loaded from a file nor trained.
    is_new = True
    #: Whether the original is the network that the predictor reconstructs: of a .nern file alone.
    is_own_original = False

    def __init__(
        self,
        original: Original,
        predictor: Predictor,
        layers: LayerPreset | LayerFilter = "all_convs",
        order: OrderName = "in_filter",
        standardize: bool = True,
        pointwise: Pointwise = "crop",
        quantize: Quantize | None = None,
        tune_kept: TuneKept = "none",
        keep_zeros: bool = False,
    ) -> None:
        if not isinstance(original, Original):
            raise UsageError(
                f"original is a {type(original).__name__}; expected an Original, for example "
                "Original.from_module(net, num_classes, mean, std)."
            )
        if quantize is not None and not isinstance(quantize, Quantize):
            raise UsageError(f"quantize={quantize!r}; expected Quantize(bits=...).")
        if quantize is not None:
            predictor = Quantized(predictor, quantize.bits, quantize.per, quantize.step_rate)
        device = original.mean.device
        original.cpu()  # orders and fits are computed there
        layout = Layout.from_module(original.net, layers, pointwise, tile=predictor.kernel_size)
        require_kernel_size(predictor, layout)
        predictor.specification()  # refuses a predictor that a checkpoint could not describe
        state = original.freeze().net.state_dict()
        address_N3 = addresses(layout, state, order)  # takes seconds for large networks, so the checks above come first
        bind(predictor, layout)
        self._set_up(original, predictor, layout, order, standardize, address_N3)
        self._set_learned(self.target != 0 if keep_zeros else None)
        self.tuned = tuned(original.net, layout, tune_kept)
        # In float64: independent of the number of threads, and finite for large weights. In parts, because the table of
        # a large network has gigabytes.
        power = torch.stack([part.double().square().sum() for part in self.target.split(_PART)]).sum()
        if not power:
            names = abbreviated([layer.name for layer in layout.layers])
            raise LayoutError(f"all weights of the predicted layers ({names}) are 0; there is nothing to represent.")
        if keep_zeros and self.learned.count == layout.num_weights:
            raise LayoutError("keep_zeros=True, but no predicted weight is 0; leave it out.")
        rms = (power / self.learned.count).sqrt().float()
        self.set_constant("scale", rms if standardize else torch.ones(()))
        if predictors_are_fitted() and type(self.predictor).fit is not Predictor.fit:  # tables of gigabytes
            mask = self.learned.mask()
            self.fit_predictor(self.target.new_ones(()).expand_as(self.target) if mask is None else mask.float())
        self.to(device)

    def fit_predictor(self, error_weights_NKK: Tensor) -> None:
        """Fit the predictor to the original's kernels; see `Predictor.fit`.

        Args:
            error_weights_NKK: Weight of the squared error of each entry; 0 for entries that are no weights.
        """
        self.predictor.fit(self.target / self.scale, self.addresses, error_weights_NKK)

    @classmethod
    @plain_modes()
    def from_file(cls, file: NernFile, net: nn.Module | None = None, original: Original | None = None) -> Self:
        """The representation of a .nern file, in evaluation mode.

        Args:
            file: The file.
            net: A network of the file's architecture, for one that timm cannot make. Its weights are replaced.
            original: The original, and so the target of training; by default the reconstructed network.

        Raises:
            FileFormatError: If the file needs a network that is not given, or does not fit its network.
        """
        is_own, original = original is None, original or decoded_original(file, net)
        self = cls.__new__(cls)
        with unreadable(file.path):
            standardize = bool(file.specification["standardize"])
            self._set_up(original.freeze(), file.predictor, file.layout, file.order, standardize, file.addresses)
            self.set_constant("scale", file.scale)
            nonzero = file.nonzero
            self._set_learned(None if nonzero is None else file.layout.table(nonzero, file.predictor.block))
            own = original.net.state_dict()
            # Rounded, trained, or with folded BatchNorm.
            kept = {key: value for key, value in file.kept.values.items() if value.is_floating_point()}
            # Folded statistics move back, so that the two networks have the same parameters.
            kept |= with_statistics(original.net, {**own, **kept}, own)
            self.tuned = Tuned({key: value for key, value in kept.items() if not torch.equal(value, own[key])})
            self.tuned.requires_grad_(False)  # there may be statistics among them
        self.is_new, self.is_own_original = False, is_own
        return self.eval()

    def _set_up(
        self,
        original: Original,
        predictor: Predictor,
        layout: Layout,
        order: OrderName,
        standardize: bool,
        address_N3: Tensor,
    ) -> None:
        """Everything but the scale and the learned entries."""
        super().__init__()
        self.tuned = Tuned({})
        self.set_constant("original", original)
        self.predictor = predictor
        self.layout = layout
        self.order: OrderName = order
        self.standardize = standardize
        self.set_constant("addresses", address_N3.int())  # int32 is the narrowest index type of `embedding`
        self.set_constant("target", layout.table(original.net.state_dict(), predictor.block).float())

    def _set_learned(self, nonzero_NKK: Tensor | None) -> None:
        self.set_constant("learned", LearnedEntries(self.layout, self.predictor.block, nonzero_NKK))

    def save(self, path: str | Path, kept: KeptForm = "fp32", fold_batch_norm: bool = False) -> None:
        """Write a .nern file, from which the reconstructed network is computed without the original.

        Args:
            path: The file, NAME.nern.
            kept: How the tensors that are not predicted are stored: as they are (`fp32`), rounded to 16 bits (`fp16`,
                `bf16`), or to 127 steps below and above 0 for each vector and each row of a matrix (`int8`; numbers far
                beyond the others get more steps, and variances are in bf16). The network of the file has the rounded
                tensors.
            fold_batch_norm: Whether the statistics of BatchNorm layers move into their weights and biases. They are not
                stored then, and the network of the file has the same outputs in evaluation mode up to rounding.

        Raises:
            StorageError: If the file cannot be written.
            UsageError: If the path does not end in .nern, or a number is too large for `kept`.
        """
        self._file(Path(path), self.reconstructed(), kept, fold_batch_norm).write()

    def _file(self, path: Path, state: Mapping[str, Tensor], kept: KeptForm, fold_batch_norm: bool) -> NernFile:
        """The .nern file of a reconstructed network's state dict."""
        state = {key: value.detach().cpu() for key, value in state.items()}  # coding works on the CPU
        state = {**state, **without_statistics(self.original.net, state)} if fold_batch_norm else state
        header = {**description(self.original), "specification": self.specification()}
        names = names_of_weights(self.original.net)
        parts = self.predictor, self.layout, self.addresses, self.scale
        nonzero = self.learned.nonzero_weights()
        if nonzero is not None:
            nonzero = {key: value.cpu() for key, value in nonzero.items()}
        return NernFile.from_network(path, header, *parts, state, names, self.original.fingerprint(), kept, nonzero)

    def kernels(self, indices: Tensor | None = None, predictor: nn.Module | None = None) -> Tensor:
        """Predicted kernels (N, K, K) in weight units: all of them, or the given rows of the table.

        Args:
            indices: Rows of the table; None takes all.
            predictor: Used in place of the representation's own; of the same class and arguments.
        """
        rows = self.addresses if indices is None else self.addresses[indices]
        return self.learned.with_zeros(predicted_kernels(predictor or self.predictor, rows, self.scale), indices)

    def weights(self, predictor: nn.Module | None = None) -> dict[str, Tensor]:
        """The predicted entries of the original's state dict, with gradients to the predictor.

        A weight that the original has under several names is one entry, under the first; `forward` and `reconstructed`
        put it in all of its places.

        Args:
            predictor: Used in place of the representation's own; of the same class and arguments.
        """
        # Training steps have a progress bar of their own.
        return self._weights(predictor or self.predictor, quiet=self.training or torch.is_grad_enabled())

    def entries(self, weights: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """All entries of the original's state dict that are not the original's: predicted ones and trained kept ones.

        Args:
            weights: What `weights()` returned; predicted here by default.
        """
        # Of the original's type, also where the representation was converted to another (`half()`).
        tuned = {key: value.to(self.scale.dtype) for key, value in self.tuned.named().items()}
        return {**(self.weights() if weights is None else weights), **tuned}

    @torch.no_grad()
    def stored_entries(
        self, weights: Mapping[str, Tensor] | None = None, kept: KeptForm = "fp32", fold_batch_norm: bool = False
    ) -> dict[str, Tensor]:
        """As `entries`, of the network in the file that `save` writes: kept tensors may be rounded or folded.

        Args:
            weights: See `entries`.
            kept: See `save`.
            fold_batch_norm: See `save`.
        """
        values = self._unpredicted_file(kept, fold_batch_norm).kept.values
        return {**self.entries(weights), **{key: value.to(self.scale.device) for key, value in values.items()}}

    def _weights(self, predictor: nn.Module, quiet: bool = False) -> dict[str, Tensor]:
        block = self.predictor.block
        weights = predicted_weights(predictor, block, self.layout, self.addresses, self.scale, quiet)
        return self.learned.weights_with_zeros(weights)

    def original_weights(self) -> dict[str, Tensor]:
        """The original's values of the weights that `weights` predicts."""
        return self.layout.weights(self.target)

    def original_entries(self) -> dict[str, Tensor]:
        """The original's values of the entries that `entries` returns."""
        state = self.original.net.state_dict()
        return {**self.original_weights(), **{key: state[key] for key in self.tuned.keys}}

    def trained_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters of the predictor, and the kept tensors that are trained."""
        yield from self.predictor.parameters()
        yield from self.tuned.parameters()

    def lr_multipliers(self) -> dict[nn.Parameter, float]:
        """Trained parameters whose learning rate is not the optimizer's, and the ratio of the two."""
        own = {self.predictor.get_parameter(n): ratio for n, ratio in self.predictor.lr_multipliers().items()}
        return own | dict.fromkeys(self.tuned.parameters(), TUNED_RATE)

    def forward(self, images_BCHW: Tensor, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """Logits (B, C) of the reconstructed CNN for pixels in [0, 1].

        Args:
            images_BCHW: Pixels.
            weights: The result of `weights()`, to reuse it for several batches; by default it is computed.
        """
        logits: Tensor = self.original(images_BCHW, self.entries(weights))
        return logits

    @plain_modes()
    @torch.no_grad()
    def reconstructed(self) -> dict[str, Tensor]:
        """The reconstructed CNN as a state dict with the original's keys and types, for `timm.create_model`."""
        state = self.original.net.state_dict()  # with the versions of its modules, which `load_state_dict` reads
        for key, value in state.items():
            state[key] = value.detach().clone()
        weights = self._weights(self.predictor)
        for layer in self.layout.layers:
            for key in (layer.key, *layer.aliases):
                state[key].copy_(weights[layer.key])
        names = names_of_weights(self.original.net)
        for key, value in self.tuned.named().items():
            for name in names[key]:
                state[name].copy_(value)
        return state

    def module(self) -> nn.Module:
        """The reconstructed CNN as a plain module in evaluation mode, a copy; it takes normalized images."""
        net = copy.deepcopy(self.original.net)
        net.load_state_dict(self.reconstructed())
        return net.requires_grad_().eval()

    def sizes(self, kept: KeptForm = "fp32", fold_batch_norm: bool = False) -> Sizes:
        """Sizes: the paper's compression ratio, and the bytes of the file that `save` would write. Predicts no weights.

        Training changes them where something is entropy-coded: the predictor's codes or integers, or trained kept
        tensors with `kept="int8"`.

        Args:
            kept: See `save`.
            fold_batch_norm: See `save`.
        """
        file = self._unpredicted_file(kept, fold_batch_norm)
        original_bytes = int(file.header["original_bytes"])
        predictor, weights = self.predictor, self.layout.num_weights
        file_bytes, code_bits = file.sizes()
        return Sizes(predictor.num_params, code_bits, weights, file_bytes, original_bytes)

    def _unpredicted_file(self, kept: KeptForm, fold_batch_norm: bool) -> NernFile:
        """The file that `save` would write, with checks of other weights, because none are predicted."""
        state = {**self.original.net.state_dict(), **self.tuned.named()}
        return self._file(Path("unpredicted.nern"), state, kept, fold_batch_norm)

    def specification(self) -> dict[str, Any]:
        """The description of the representation as JSON values: layers, order, scale and predictor.

        Two representations of one original can load each other's checkpoints if and only if these are equal.
        """
        tile = shortest(self.layout.tile)
        return {
            "layers": {layer.key: list(layer.shape) for layer in self.layout.layers},
            "aliases": {layer.key: list(layer.aliases) for layer in self.layout.layers if layer.aliases},
            "pointwise": self.layout.pointwise,
            "tile": tile if isinstance(tile, int) else list(tile),
            "order": self.order,
            "standardize": self.standardize,
            "predictor": self.predictor.specification(),
            **({"keep_zeros": True} if self.learned.keeps_zeros else {}),
        }

    def _identity(self) -> dict[str, Any]:
        """The entries that must be equal in a checkpoint that this representation can load."""
        return {
            "original": self.original.fingerprint(),
            "specification": self.specification(),
            "scale": self.scale.cpu(),
        }

    def get_extra_state(self) -> dict[str, Any]:
        return {
            **self._identity(),
            "order": pack_order(self.layout, self.addresses, self.order),
            "class_names": list(self.original.class_names),
        }

    def set_extra_state(self, state: Any) -> None:
        """Load a checkpoint's scale, order and class names; the predictor was fitted with them.

        Class names that the original has already are kept.

        Raises:
            CheckpointError: If it belongs to another original or to a representation that is built differently, or is
                damaged.
        """
        require_compatible(self._identity(), state)
        try:
            # An order may come out differently on another machine; the predictor knows the one that it was fitted with.
            table_N3 = unpack_order(self.layout, state["order"], self.order)
        except LayoutError as error:
            raise CheckpointError(f"the checkpoint is damaged: {error} Pass another one.") from error
        self.original.class_names = tuple(state.get("class_names", ())) or self.original.class_names
        self.set_constant("scale", state["scale"].to(self.scale))
        self.set_constant("addresses", table_N3.to(self.addresses))
        self.is_new = False
