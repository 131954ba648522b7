"""The Fisher information of convolutions as a Kronecker product of two covariances (KFC, arXiv 1602.01407).

Shapes: B images, P positions of a layer's output, X = B * P, O filters, D inputs of a filter (channels * kernel).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, unfold

from nernlit.errors import UsageError
from nernlit.originals.original import Original
from nernlit.originals.sensitivity import ADVICE, drawn_labels, layers_with, total_of
from nernlit.utilities.processes import ALONE, Processes
from nernlit.utilities.text import abbreviated

#: Pixels of one channel that are processed at once: 16 images of CIFAR, one of ImageNet.
_PIXELS = 2**14


class Factors(NamedTuple):
    """The two factors of a convolution's Fisher information.

    Attributes:
        outputs: Mean over images of the sum over positions of g g^T, where g is d log p(y | x) / d output; (O, O).
        inputs: Mean over images and positions of a a^T, where a is the position's input patch; (D, D).
    """

    outputs: Tensor
    inputs: Tensor


def kronecker_factors(
    original: Original,
    keys: Sequence[str],
    batches: Iterable[Tensor],
    seed: int = 0,
    advance: Callable[[int], None] = lambda done: None,
    processes: Processes = ALONE,
) -> dict[str, Factors]:
    """The factors of each convolution, in float64; the label y of each image is drawn from the network's own p(y | x).

    The result does not depend on how the images are divided into batches.

    Args:
        original: A frozen classifier.
        keys: State-dict keys of the weights.
        batches: Pixels (B, channels, height, width) in [0, 1].
        seed: Seed of the labels.
        advance: Called with the number of images done since its last call.
        processes: The processes that share the images: process r of W has images r, r + W, r + 2 W, ..., at least one.

    Raises:
        UsageError: If a weight is not that of one ungrouped `Conv2d` layer with zero padding, which is called.
    """
    generator = torch.Generator().manual_seed(seed)
    state = original.net.state_dict()
    convs = _convolutions(original.net, keys)
    sums = {key: [state[key].new_zeros(side, side, dtype=torch.float64) for side in _sides(convs[key])] for key in keys}
    calls: list[tuple[str, Tensor, Tensor]] = []
    inputs_of = dict.fromkeys(keys, 0)  # images of all calls of a layer

    def note(key: str) -> Callable[..., Tensor]:
        def hook(conv: nn.Conv2d, args: tuple[Any, ...], options: dict[str, Any], output: Tensor) -> Tensor:
            maps = args[0] if args else options["input"]
            assert not isinstance(conv.padding, str)
            patches_BDP = unfold(maps.detach(), conv.kernel_size, conv.dilation, conv.padding, conv.stride)
            calls.append((key, patches_BDP, output))
            return output.clone()  # an activation in place would replace what the gradient is taken of

        return hook

    handles = [conv.register_forward_hook(note(key), with_kwargs=True) for key, conv in convs.items()]
    count = 0
    try:
        for images_BCHW in _parts(batches):
            calls.clear()
            weights = {key: state[key].clone().requires_grad_() for key in keys}
            with torch.enable_grad():
                logits_BC = original(images_BCHW, weights)
                labels_B = drawn_labels(logits_BC.detach(), generator, processes)
                loss = cross_entropy(logits_BC, labels_B, reduction="sum")
                outputs = [output for _, _, output in calls]
                gradients = torch.autograd.grad(loss, outputs, materialize_grads=True) if outputs else ()
            for (key, patches_BDP, _), gradient in zip(calls, gradients, strict=True):
                gradient_OX, patches_DX = (each.flatten(2).movedim(1, 0).flatten(1) for each in (gradient, patches_BDP))
                sums[key][0] += gradient_OX @ gradient_OX.T
                sums[key][1] += patches_DX @ patches_DX.T / patches_BDP.shape[2]
                inputs_of[key] += len(patches_BDP)
            count += len(images_BCHW)
            advance(len(images_BCHW))
    finally:
        for handle in handles:
            handle.remove()
    if unused := [key for key in keys if not inputs_of[key]]:
        raise UsageError(f"sensitivity kronecker: {abbreviated(unused, 3)}: not used by calling a layer; {ADVICE}.")
    images = total_of(count, processes, original)
    found = {}
    for key, (outputs, inputs) in sums.items():
        of_inputs = total_of(inputs_of[key], processes, original)
        found[key] = Factors(processes.total(outputs) / images, processes.total(inputs) / of_inputs)
    return found


def _parts(batches: Iterable[Tensor]) -> Iterator[Tensor]:
    """Smaller batches: the input patches of all layers are in memory at once."""
    for images_BCHW in batches:
        yield from images_BCHW.split(max(1, _PIXELS // images_BCHW[0, 0].numel()))


def _convolutions(net: nn.Module, keys: Sequence[str]) -> dict[str, nn.Conv2d]:
    """The convolution of each weight.

    Raises:
        UsageError: If a weight is not that of one ungrouped `Conv2d` layer with zero padding.
    """
    found: dict[str, nn.Conv2d] = {}
    for key, own in layers_with(net, keys).items():
        if len(own) == 1 and type(own[0]) is nn.Conv2d and own[0].groups == 1 and not isinstance(own[0].padding, str):
            found[key] = own[0]
    if others := [key for key in keys if key not in found or found[key].padding_mode != "zeros"]:
        raise UsageError(
            "sensitivity kronecker is for ungrouped Conv2d layers with zero padding of a given width, and "
            f"{abbreviated(others, 3)} {'is' if len(others) == 1 else 'are'} of others; {ADVICE}."
        )
    return found


def _sides(conv: nn.Conv2d) -> tuple[int, int]:
    """(O, D) of a convolution."""
    return conv.weight.shape[0], conv.weight[0].numel()
