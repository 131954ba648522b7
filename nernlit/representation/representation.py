"""The representation: an original, its layout and order, and a predictor, as one plain `nn.Module`.

Schemes train it, files store it, analyses read it; nothing here needs Lightning.

Shapes: N kernels, K kernel side that the predictor gives (at least the layout's), B images, C classes.
"""

import copy
from collections.abc import Callable, Mapping
from typing import Any, Self, final

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nernlit.errors import CheckpointError, LayoutError
from nernlit.kernels import (
    LayerFilter,
    LayerPreset,
    Layout,
    OrderName,
    addresses,
    pack_order,
    packed_bits,
    unpack_order,
)
from nernlit.originals import Original
from nernlit.predictors import Predictor
from nernlit.representation.sizes import Sizes
from nernlit.representation.specification import differences
from nernlit.utilities.constants import WithConstants
from nernlit.utilities.progress import progress

#: A table of up to so many kernels is predicted in one piece, and nothing is computed twice.
_WHOLE = 65_536
#: Kernels of a larger table predicted at a time; bounds the memory of its activations.
_CHUNK = 16_384
_ALL = (slice(None), slice(None))


@final
class Representation(WithConstants):
    """A CNN whose convolution kernels come out of a predictor.

    Its `state_dict` holds the predictor and, as extra state, the specification, the scale, the packed order and the
    original's fingerprint; never the original.

    Args:
        original: The CNN; it is frozen and stays in evaluation mode.
        predictor: Maps addresses to kernels.
        layers: Which convolutions are predicted: a preset or a `LayerFilter`.
        order: How kernels are numbered: `in_filter` (the paper's for CIFAR and STL), `cross_filter` (ImageNet) or
            `none`.
        standardize: Let the predictor work in units of the weights' root mean square (ours); False is NeRN's.

    Raises:
        LayoutError: If no layer matches, the predictor's kernels are smaller than a layer's, or the layers' weights are
            not finite or all zero.
        UsageError: If the predictor does not keep its constructor's arguments.
    """

    original: Original
    scale: Tensor
    addresses: Tensor
    target: Tensor
    layer_masks: Tensor

    def __init__(
        self,
        original: Original,
        predictor: Predictor,
        layers: LayerPreset | LayerFilter = "all_convs",
        order: OrderName = "in_filter",
        standardize: bool = True,
    ) -> None:
        self._own(original, predictor, Layout.of(original.net, layers), order, standardize)

    @classmethod
    def of_parts(
        cls,
        original: Original,
        predictor: Predictor,
        layout: Layout,
        order: OrderName,
        standardize: bool,
        address_N3: Tensor,
        scale: Tensor,
    ) -> Self:
        """A representation whose addresses and scale are known and not read off the original's weights.

        Args:
            original: The CNN; it is frozen and stays in evaluation mode.
            predictor: Maps addresses to kernels.
            layout: Which weights are predicted, in which rows.
            order: What the addresses' order is called.
            standardize: Whether the predictor works in units of `scale`.
            address_N3: Address of every kernel, (N, 3).
            scale: Weight units of the predictor's unit, a scalar.

        Raises:
            LayoutError: See the class.
        """
        self = cls.__new__(cls)
        self._own(original, predictor, layout, order, standardize, address_N3)
        self.set_constant("scale", scale)
        return self

    def _own(
        self,
        original: Original,
        predictor: Predictor,
        layout: Layout,
        order: OrderName,
        standardize: bool,
        address_N3: Tensor | None = None,
    ) -> None:
        WithConstants.__init__(self)
        self.set_constant("original", original.freeze())
        self.predictor = predictor
        self.layout = layout
        self.order: OrderName = order
        self.standardize = standardize
        size = predictor.kernel_size
        if size < layout.kernel_size:
            largest = max(layout.layers, key=lambda layer: max(layer.shape[2:]))
            raise LayoutError(
                f"kernel_size={size} is smaller than layer {largest.name!r} "
                f"({largest.shape[2]}x{largest.shape[3]}); pass --model.representation.predictor.kernel_size="
                f"{layout.kernel_size}, or leave the layer out (--model.representation.layers)."
            )
        self.specification()  # refuses a predictor that a checkpoint could not describe
        if address_N3 is None:  # an order takes seconds for large networks: what cannot work has been refused by now
            address_N3 = addresses(layout, original.net.state_dict(), order)
        extent = address_N3.amax(0) + 1
        predictor.bind((int(extent[0]), int(extent[1]), int(extent[2])))
        self.set_constant("addresses", address_N3.int())  # embeddings take nothing narrower
        self.set_constant("layer_masks", layout.layer_masks(size))
        self._take_target(original.net.state_dict())
        # In float64: independent of the number of threads, and finite for large weights.
        power = self.target.double().square().sum() / layout.num_weights
        if not power:
            names = ", ".join(layer.name for layer in layout.layers[:5])
            raise LayoutError(
                f"all weights of the predicted layers ({names}, ...) are 0; there is nothing to represent."
            )
        self.set_constant("scale", power.sqrt().float() if standardize else torch.ones(()))

    def _take_target(self, state: Mapping[str, Tensor]) -> None:
        self.set_constant("target", self.layout.table(state, self.predictor.kernel_size).float())

    def adopt_reconstruction(self) -> None:
        """Make the reconstructed weights the original's own, so that they are what further training starts from."""
        self.original.net.load_state_dict(self.reconstructed())
        self._take_target(self.original.net.state_dict())

    def kernels(self, indices: Tensor | None = None, predictor: nn.Module | None = None) -> Tensor:
        """Predicted kernels (N, K, K) in weight units: all of them, or the given rows of the table.

        Args:
            indices: Rows of the table; None takes all.
            predictor: One of the same form to ask in place of the representation's own.
        """
        rows = self.addresses if indices is None else self.addresses[indices]
        return self._predicted(rows, predictor, len(rows) > _WHOLE)

    def weights(self, predictor: nn.Module | None = None) -> dict[str, Tensor]:
        """The predicted entries of the original's state dict, with gradients to the predictor.

        A weight that the original has under several names is one entry, under the first; `forward` and `reconstructed`
        put it in all of its places.

        Args:
            predictor: One of the same form to ask in place of the representation's own.
        """
        if self.training or torch.is_grad_enabled():  # training steps have a progress bar of their own
            return self._weights(predictor, lambda done: None)
        return self._weights_with_progress(predictor)

    def _weights_with_progress(self, predictor: nn.Module | None = None) -> dict[str, Tensor]:
        kernels = self.layout.num_kernels
        with progress(f"predicting {kernels:,} kernels", kernels) as advance:
            return self._weights(predictor, advance)

    def _weights(self, predictor: nn.Module | None, advance: Callable[[int], None]) -> dict[str, Tensor]:
        if self.layout.num_kernels <= _WHOLE:
            return self.layout.weights(self._predicted(self.addresses, predictor, False))
        # Cropped before they are joined: most kernels of a ResNet50 are 1x1, and predicted as 7x7.
        weights, size = {}, self.predictor.kernel_size
        for layer in self.layout.layers:
            kernels = self._predicted(self.addresses[layer.rows], predictor, True, layer.crop(size))
            weights[layer.key] = kernels.view(layer.shape)
            advance(layer.kernels)
        return weights

    def original_weights(self) -> dict[str, Tensor]:
        """The original's own entries of what `weights` predicts."""
        return self.layout.weights(self.target)

    def _predicted(
        self, addresses_N3: Tensor, predictor: nn.Module | None, in_chunks: bool, crop: tuple[slice, slice] = _ALL
    ) -> Tensor:
        """Kernels (N, kh, kw) in weight units.

        With gradients, a chunk's activations are computed again in the backward pass, so that memory does not grow with
        the number of chunks.
        """

        ask = predictor or self.predictor

        def cropped(chunk_N3: Tensor) -> Tensor:
            kernels_NKK: Tensor = ask(chunk_N3).to(self.scale.dtype) * self.scale
            return kernels_NKK[:, *crop]

        if not in_chunks:
            return cropped(addresses_N3)
        chunks = addresses_N3.split(_CHUNK)
        if torch.is_grad_enabled():
            return torch.cat([checkpoint(cropped, chunk, use_reentrant=False) for chunk in chunks])
        return torch.cat([cropped(chunk) for chunk in chunks])

    def mask(self, indices: Tensor | None = None) -> Tensor | None:
        """(N, K, K) booleans: which entries are weights; None where all of them are."""
        if self._all_full:
            return None
        layers = self.addresses[:, 0] if indices is None else self.addresses[indices, 0]
        return self.layer_masks[layers]

    @property
    def _all_full(self) -> bool:
        return self.layout.num_weights == self.layout.num_kernels * self.predictor.kernel_size**2

    def forward(self, images_BCHW: Tensor, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """Logits (B, C) of the reconstructed CNN for pixels in [0, 1].

        Args:
            images_BCHW: Pixels.
            weights: What `weights()` returned, where it serves several batches; predicted here by default.
        """
        logits: Tensor = self.original(images_BCHW, self.weights() if weights is None else weights)
        return logits

    @torch.no_grad()
    def reconstructed(self) -> dict[str, Tensor]:
        """The reconstructed CNN as a state dict with the original's keys and types, for `timm.create_model`."""
        state = {key: value.detach().clone() for key, value in self.original.net.state_dict().items()}
        weights = self._weights_with_progress()
        for layer in self.layout.layers:
            for key in (layer.key, *layer.aliases):
                state[key].copy_(weights[layer.key])
        return state

    def module(self) -> nn.Module:
        """The reconstructed CNN as a plain module in evaluation mode, a copy; it takes normalized images."""
        net = copy.deepcopy(self.original.net)
        net.load_state_dict(self.reconstructed())
        return net.eval()

    def sizes(self) -> Sizes:
        """What there is to store, by the paper's count and in full."""
        order_bytes = (packed_bits(self.layout, self.order) + 7) // 8
        state = self.original.net.state_dict()
        return Sizes.of(self.predictor.num_params, self.layout.num_weights, order_bytes, state.values())

    def specification(self) -> dict[str, Any]:
        """How the representation is built, in primitives: its layers, order, scale and predictor.

        Two representations of one original can load each other's checkpoints if and only if these are equal.
        """
        return {
            "layers": {layer.key: list(layer.shape) for layer in self.layout.layers},
            "aliases": {layer.key: list(layer.aliases) for layer in self.layout.layers if layer.aliases},
            "order": self.order,
            "standardize": self.standardize,
            "predictor": self.predictor.specification(),
        }

    def get_extra_state(self) -> dict[str, Any]:
        return {
            "original": self.original.fingerprint(),
            "specification": self.specification(),
            "scale": self.scale.cpu(),
            "order": pack_order(self.layout, self.addresses, self.order),
        }

    def set_extra_state(self, state: Any) -> None:
        """Take over a checkpoint's scale and order: those that its predictor was fitted with.

        Raises:
            CheckpointError: If it belongs to another original or to a representation that is built differently, or is
                damaged.
        """
        kinds = {"original": str, "specification": dict, "scale": Tensor, "order": Tensor}
        if not isinstance(state, dict) or any(not isinstance(state.get(key), kind) for key, kind in kinds.items()):
            raise CheckpointError(
                "the checkpoint does not say how its representation is built: it was written by another version of "
                "nernlit. Fit it again with this one."
            )
        own = self.original.fingerprint()
        if state["original"] != own:
            raise CheckpointError(
                f"the checkpoint was fitted to another original (SHA-256 {state['original'][:12]}..., this one's is "
                f"{own[:12]}...); pass the weights that it was fitted to (--model.representation.original.checkpoint)."
            )
        if differing := differences(self.specification(), state["specification"]):
            raise CheckpointError(
                f"the checkpoint was fitted with another representation: {'; '.join(differing)}. Use the checkpoint's "
                "values; with init_from, leave `representation` out to take them all from the checkpoint."
            )
        scale = state["scale"]
        if scale.shape != self.scale.shape or not torch.allclose(scale.float(), self.scale.cpu(), rtol=1e-4):
            raise CheckpointError("the checkpoint is damaged: its scale is wrong. Pass another one.")
        try:
            # An order may come out differently on another machine; the predictor knows the one that it was fitted with.
            table_N3 = unpack_order(self.layout, state["order"], self.order)
        except LayoutError as error:
            raise CheckpointError(f"the checkpoint is damaged: {error} Pass another one.") from error
        self.set_constant("scale", scale.to(self.scale))
        self.set_constant("addresses", table_N3.to(self.addresses))
