"""Sensitivities: estimates of how much the network's outputs change per squared error of each weight.

Each function returns state-dict key -> non-negative values of the weight's shape. Their units differ.

The Fisher information of a convolution's weight is the mean square of a sum over all positions at which its kernel is
applied. If the derivatives at different positions are independent with mean 0, it is the number of positions times the
mean square at one position. So the cheaper estimates are proportional to the number of positions.

Shapes: B images, C input channels of a layer, F filters (output channels), G groups.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from nernlit.errors import UsageError
from nernlit.originals.original import Original
from nernlit.utilities.processes import ALONE, Processes
from nernlit.utilities.sharing import names_of_weights
from nernlit.utilities.text import abbreviated

_Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
_Layer = _Conv | nn.Linear
_BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm
#: What to do about layers that a kind of sensitivity cannot handle.
ADVICE = "pass fisher, or leave these layers out (--model.representation.layers)"


def fisher_information(
    original: Original,
    keys: Sequence[str],
    batches: Iterable[Tensor],
    seed: int = 0,
    advance: Callable[[int], None] = lambda done: None,
    processes: Processes = ALONE,
) -> dict[str, Tensor]:
    """The diagonal Fisher information: the mean of (d log p(y | x) / d weight)^2 over images x.

    The label y of each image is drawn from the network's own p(y | x). The result does not depend on how the images are
    divided into batches. Each image needs a backward pass of its own.

    Args:
        original: A frozen classifier.
        keys: State-dict keys of the weights; of a weight with several names, one of them.
        batches: Pixels (B, channels, height, width) in [0, 1].
        seed: Seed of the labels.
        advance: Called with the number of images done since its last call.
        processes: The processes that share the images: process r of W has images r, r + W, r + 2 W, ..., at least one.
    """
    generator = torch.Generator().manual_seed(seed)
    state = original.net.state_dict()
    weights = {key: state[key].clone().requires_grad_() for key in keys}
    sums = {key: torch.zeros_like(state[key]) for key in keys}
    count = 0
    with torch.enable_grad():
        for images_BCHW in batches:
            for image_CHW in images_BCHW:
                logits_1C = original(image_CHW[None], weights)
                loss = cross_entropy(logits_1C, drawn_labels(logits_1C.detach(), generator, processes))
                gradients = torch.autograd.grad(loss, list(weights.values()), materialize_grads=True)
                for total, gradient in zip(sums.values(), gradients, strict=True):
                    total.addcmul_(gradient, gradient)
                advance(1)
            count += len(images_BCHW)
    images = total_of(count, processes, original)
    return {key: processes.total(own) / images for key, own in sums.items()}


def total_of(count: int, processes: Processes, original: Original) -> Tensor:
    """The number of images of all processes."""
    return processes.total(torch.tensor(count, device=original.mean.device))


def drawn_labels(logits_BC: Tensor, generator: torch.Generator, processes: Processes) -> Tensor:
    """The labels (B,) of images, drawn with the probabilities of the logits.

    Each process draws the random numbers of all processes, so that every image gets a different one.
    """
    drawn = (torch.rand(processes.world_size, generator=generator, dtype=torch.float64) for _ in logits_BC)
    labels = [
        drawn_label(logits_C[None], each[processes.rank]) for logits_C, each in zip(logits_BC, drawn, strict=True)
    ]
    return torch.cat(labels)


def drawn_label(logits_1C: Tensor, drawn: Tensor) -> Tensor:
    """The label (1,) of an image, with the probabilities of the logits.

    Args:
        logits_1C: The logits.
        drawn: A random number in [0, 1), float64 on the CPU.
    """
    ends_C = logits_1C[0].cpu().double().softmax(0).cumsum(0)
    label = torch.searchsorted(ends_C, drawn * ends_C[-1], right=True).clamp_max(len(ends_C) - 1)
    return label.view(1).to(logits_1C.device)


@torch.no_grad()
def activation_moments(
    original: Original,
    keys: Sequence[str],
    batches: Iterable[Tensor],
    advance: Callable[[int], None] = lambda done: None,
    processes: Processes = ALONE,
) -> dict[str, Tensor]:
    """Positions * (BatchNorm factor of the filter)^2 * E[x^2] of the input channel, equal for all entries of a kernel.

    Positions is the number of places of an image at which the layer's kernels are applied: the outputs of a filter, or
    the inputs of a channel of a transposed convolution. The factor is what the BatchNorm layer behind a layer
    multiplies each of its filters by, and 1 where there is none (see `batch_norms_after`). Several calls of a layer,
    or layers with the same weight, are summed.

    Args:
        original: A frozen classifier.
        keys: State-dict keys of weights of convolutions and linear layers.
        batches: Pixels (B, channels, height, width) in [0, 1].
        advance: Called with the number of images done since its last call.
        processes: The processes that share the images; each has at least one.

    Raises:
        UsageError: If the network uses a weight other than by calling its layer, as `MultiheadAttention` does.
    """
    layers = layers_with(original.net, keys)
    norms = batch_norms_after(original.net)
    sums: dict[nn.Module, Tensor] = {}

    def note(layer: _Layer, maps: Tensor, positions: int) -> None:
        channel = maps.dim() + 1 - layer.weight.dim()  # the second of a convolution, the last of a linear layer
        moment_C = maps.square().transpose(channel, -1).flatten(0, -2).mean(0)
        sums[layer] = sums.get(layer, 0) + positions * moment_C

    count = 0
    with _calls(layers, note):
        for images_BCHW in batches:
            original(images_BCHW)
            count += len(images_BCHW)
            advance(len(images_BCHW))
    unseen = [key for key, own in layers.items() if not any(layer in sums for layer in own)]
    if unseen:
        raise UsageError(f"sensitivity activation: {_named(unseen)} not used by calling a layer; {ADVICE}.")
    images = total_of(count, processes, original)
    seen = {key: [layer for layer in own if layer in sums] for key, own in layers.items()}
    moments = {layer: processes.total(sums[layer]) / images for own in seen.values() for layer in own}
    return {
        key: torch.stack([_per_weight(layer, _factors(layer, norms.get(layer)), moments[layer]) for layer in own]).sum(
            0
        )
        for key, own in seen.items()
    }


@torch.no_grad()
def batch_norm_moments(original: Original, keys: Sequence[str], image_size: tuple[int, int]) -> dict[str, Tensor]:
    """The same as `activation_moments` without images: E[x^2] is estimated from the BatchNorm layer's own statistics.

    A filter with weights w and independent inputs of variance v has outputs of variance v * |w|^2. So v is the mean of
    the BatchNorm layer's variances over the mean of |w|^2, one number per layer.

    Args:
        original: A frozen classifier; it is run once, on an image of zeros, to count positions.
        keys: State-dict keys of weights of convolutions and linear layers.
        image_size: Height and width of its images in pixels.

    Raises:
        UsageError: If there is no BatchNorm layer behind one of these layers, or the network cannot run on images of
            this size.
    """
    layers = layers_with(original.net, keys)
    norms = batch_norms_after(original.net)
    without = [key for key, own in layers.items() if not own or any(layer not in norms for layer in own)]
    if without:
        raise UsageError(f"sensitivity batchnorm: {_named(without)} not followed by BatchNorm; {ADVICE}.")
    counts: dict[nn.Module, int] = {}

    def note(layer: _Layer, maps: Tensor, positions: int) -> None:
        counts[layer] = counts.get(layer, 0) + positions

    try:
        with _calls(layers, note):
            original(original.mean.new_zeros(1, original.in_chans, *image_size))
    except (RuntimeError, ValueError, AssertionError) as error:
        size = "{}x{}".format(*image_size)
        raise UsageError(
            f"sensitivity batchnorm: {original.name!r} cannot run on images of {size} pixels "
            f"({' '.join(str(error).split())}); pass their size as sensitivity.image_size."
        ) from error
    return {
        key: torch.stack(
            [
                _per_weight(layer, _factors(layer, norms[layer]), counts.get(layer, 0) * _variance(layer, norms[layer]))
                for layer in own
            ]
        ).sum(0)
        for key, own in layers.items()
    }


def batch_norms_after(net: nn.Module) -> dict[nn.Module, _BatchNorm]:
    """Convolution or linear layer -> the BatchNorm layer behind it.

    That is the next module with weights or statistics, in the order in which the network lists its modules, if it is a
    BatchNorm layer with running statistics and a channel for each filter.
    """
    found: dict[nn.Module, _BatchNorm] = {}
    before: _Layer | None = None
    for module in net.modules():
        if isinstance(module, _BatchNorm) and module.running_var is not None and before is not None:
            if len(module.running_var) == _channels(before)[1]:
                found[before] = module
            before = None
        elif next(module.parameters(recurse=False), None) is not None:
            before = module if isinstance(module, _Layer) else None
    return found


def layers_with(net: nn.Module, keys: Sequence[str]) -> dict[str, list[_Layer]]:
    """State-dict key -> the convolutions and linear layers with this weight."""
    names = names_of_weights(net)
    found: dict[str, list[_Layer]] = {key: [] for key in keys}
    first = {name: key for key in keys for name in names[key]}
    for name, module in net.named_modules():
        key = first.get(f"{name}.weight".removeprefix("."))
        if key is not None and isinstance(module, _Layer):
            found[key].append(module)
    return found


@contextmanager
def _calls(layers: dict[str, list[_Layer]], note: Callable[[_Layer, Tensor, int], None]) -> Iterator[None]:
    """In the `with` block, each call of one of the layers calls `note(layer, inputs, positions of all images)`."""

    def hook(layer: nn.Module, args: tuple[Any, ...], options: dict[str, Any], output: Tensor) -> None:
        assert isinstance(layer, _Layer)
        maps: Tensor = args[0] if args else options["input"]
        channels, filters = _channels(layer)
        is_transposed = getattr(layer, "transposed", False)
        note(layer, maps, maps.numel() // channels if is_transposed else output.numel() // filters)

    handles = [layer.register_forward_hook(hook, with_kwargs=True) for own in layers.values() for layer in own]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _channels(layer: _Layer) -> tuple[int, int]:
    """(C, F): the input and output channels of a layer."""
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    return layer.in_channels, layer.out_channels


def _factors(layer: _Layer, norm: _BatchNorm | None) -> Tensor:
    """What the BatchNorm layer multiplies each filter by, (F,)."""
    if norm is None:
        return layer.weight.new_ones(_channels(layer)[1])
    assert norm.running_var is not None
    factor_F = (norm.running_var + norm.eps).rsqrt()
    return factor_F * norm.weight if norm.affine else factor_F


def _variance(layer: _Layer, norm: _BatchNorm) -> Tensor:
    """The variance of a layer's inputs, by the statistics of the BatchNorm layer behind it: (C,), all equal."""
    assert norm.running_var is not None
    channels, filters = _channels(layer)
    power = layer.weight.square().sum() / filters
    return (norm.running_var.mean() / power.clamp_min(torch.finfo(power.dtype).tiny)).expand(channels)


def _per_weight(layer: _Layer, factor_F: Tensor, moment_C: Tensor) -> Tensor:
    """factor^2 * moment for each weight of a layer."""
    groups = getattr(layer, "groups", 1)
    outputs_GF, inputs_GC = factor_F.square().view(groups, -1), moment_C.reshape(groups, -1)
    # A transposed convolution has its input channels first.
    rows, columns = (inputs_GC, outputs_GF) if getattr(layer, "transposed", False) else (outputs_GF, inputs_GC)
    matrix = (rows[:, :, None] * columns[:, None]).flatten(0, 1)
    return matrix.view(*matrix.shape, *[1] * (layer.weight.dim() - 2)).expand_as(layer.weight)


def _named(keys: Sequence[str]) -> str:
    """The keys with the verb of a sentence."""
    return f"{abbreviated(keys, 3)} {'is' if len(keys) == 1 else 'are'}"
