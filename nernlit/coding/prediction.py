"""Predicted weights, computed in chunks that bound the memory.

Shapes: N kernels, K x K size of the predicted kernels (at least the layout's).
"""

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nernlit.errors import LayoutError, UsageError
from nernlit.kernels import Layout
from nernlit.predictors import Predictor
from nernlit.utilities.progress import progress
from nernlit.utilities.sides import Size, shortest

#: Up to this many kernels are predicted in one forward pass, without activation checkpointing.
_MAX_UNCHUNKED = 65_536
#: Kernels per chunk of a larger table; bounds the memory of the activations.
_CHUNK = 16_384
_ALL = (slice(None), slice(None))


def require_kernel_size(predictor: Predictor, layout: Layout) -> None:
    """Refuse a predictor whose kernels are smaller than a layer's.

    Raises:
        LayoutError: With the layer and the kernel size that is needed.
    """
    height, width = predictor.block
    larger = [layer for layer in layout.layers if layer.block[0] > height or layer.block[1] > width]
    if larger:
        largest = max(larger, key=lambda layer: max(layer.block))
        kernels = [layer.block for layer in layout.layers if layer.tile is None] or [layout.block]
        needed = shortest((max(h for h, _ in kernels), max(w for _, w in kernels)))
        raise LayoutError(
            f"kernel_size={_written(predictor.kernel_size)} is smaller than layer {largest.name!r} "
            f"({'x'.join(map(str, largest.block))}); pass --model.representation.predictor.kernel_size="
            f"{_written(needed)}, or exclude the layer (--model.representation.layers)."
        )


def _written(size: Size) -> str:
    """A size as the command line takes it."""
    return str(size) if isinstance(size, int) else f"[{size[0]},{size[1]}]"


def bind(predictor: Predictor, layout: Layout) -> None:
    """Call a predictor's `bind` for the addresses of a layout.

    Raises:
        UsageError: If the predictor is that of another representation, which it would change.
    """
    if predictor.is_bound:
        raise UsageError(
            f"this {type(predictor).__name__} is the predictor of another representation; make a new one for each."
        )
    predictor.is_bound = True
    predictor.crops = [layer.crop(predictor.block) for layer in layout.layers]
    predictor.bind([layer.grid for layer in layout.layers])


def predicted_kernels(predictor: nn.Module, addresses_N3: Tensor, scale: Tensor) -> Tensor:
    """The kernels (N, K, K) at the given addresses, in weight units.

    Args:
        predictor: Maps addresses to kernels in units of `scale`.
        addresses_N3: Layer number, filter position and channel position of each kernel.
        scale: One unit of the predictor's output in weight units, a scalar.
    """
    if len(addresses_N3) > _MAX_UNCHUNKED:
        return _in_chunks(_resolved(predictor), addresses_N3, scale, _ALL)
    return _at_once(predictor, addresses_N3, scale, _ALL)


def predicted_weights(
    predictor: nn.Module,
    block: tuple[int, int],
    layout: Layout,
    addresses_N3: Tensor,
    scale: Tensor,
    quiet: bool = False,
) -> dict[str, Tensor]:
    """All weights of a layout in weight units: state-dict key -> weight.

    Args:
        predictor: See `predicted_kernels`.
        block: Height and width (Kh, Kw) of its kernels.
        layout: Which weights there are, in which rows.
        addresses_N3: The address of every row.
        scale: See `predicted_kernels`.
        quiet: Show no progress.
    """
    kernels = layout.num_kernels
    shown = nullcontext(lambda done: None) if quiet else progress(f"predicting {kernels:,} kernels", kernels)
    with shown as advance:
        if kernels <= _MAX_UNCHUNKED:
            return layout.weights(_at_once(predictor, addresses_N3, scale, _ALL))
        # Cropped before they are joined: most kernels of a ResNet50 are 1x1, and predicted as 7x7.
        weights, predict = {}, _resolved(predictor)
        for layer in layout.layers:
            crop = layer.crop(block)
            weights[layer.key] = layer.weight(_in_chunks(predict, addresses_N3[layer.rows], scale, crop))
            advance(layer.kernels)
    return weights


def _at_once(
    predictor: Callable[[Tensor], Tensor], addresses_N3: Tensor, scale: Tensor, crop: tuple[slice, slice]
) -> Tensor:
    kernels_NKK: Tensor = predictor(addresses_N3).to(scale.dtype) * scale
    return kernels_NKK[:, *crop]


def _resolved(predictor: nn.Module) -> Callable[[Tensor], Tensor]:
    """The predictor for several calls."""
    return predictor.frozen_forward() if isinstance(predictor, Predictor) else predictor


def _in_chunks(
    predictor: Callable[[Tensor], Tensor], addresses_N3: Tensor, scale: Tensor, crop: tuple[slice, slice]
) -> Tensor:
    """Predict in chunks; with gradients, activation checkpointing keeps the activations of one chunk at a time."""
    chunks = addresses_N3.split(_CHUNK)
    if torch.is_grad_enabled():
        return torch.cat([checkpoint(_at_once, predictor, chunk, scale, crop, use_reentrant=False) for chunk in chunks])
    return torch.cat([_at_once(predictor, chunk, scale, crop) for chunk in chunks])
