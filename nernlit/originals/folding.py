"""BatchNorm of a frozen network is one factor and one offset a channel: the convolution before it can apply both."""

import copy
from collections.abc import Collection, Mapping
from typing import final

import torch
from torch import Tensor, nn

from nernlit.originals.original import Original


@final
class Folded:
    """A frozen classifier that answers as the given one does, without the work of its BatchNorm layers.

    In a ResNet's training step that work takes a fifth of the time. Gradients flow to the weights of a call as they do
    in the classifier itself. It is a copy, which no module owns: it is in no checkpoint, and does not follow later
    changes of the classifier.

    Args:
        classifier: In evaluation mode.
        images_BCHW: Some pixels, which show what flows where; two images do.
        read: Names of modules whose outputs are looked at, or with `:input` behind them their inputs, and hence must
            stay what they are; see `FeatureTaps.taps`.
    """

    def __init__(self, classifier: Original, images_BCHW: Tensor, read: Collection[str] = ()) -> None:
        # The first steps of two callers may be under autocast, or make tensors that autograd refuses.
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(images_BCHW.device.type, enabled=False):
            images_BCHW = images_BCHW.clone()
            pairs = _pairs(classifier.net, classifier, images_BCHW)
            self._fold(classifier, {c: b for c, b in pairs.items() if c not in read and f"{b}:input" not in read})
            if not torch.allclose(self(images_BCHW), classifier(images_BCHW), rtol=1e-2, atol=1e-2):
                self._fold(classifier, {})  # something else reads a convolution too, which modules do not show

    def _fold(self, classifier: Original, pairs: Mapping[str, str]) -> None:
        self.classifier = copy.deepcopy(classifier)
        self.factors: dict[str, Tensor] = {}
        for conv_name, norm_name in pairs.items():
            conv, norm = self.net.get_submodule(conv_name), self.net.get_submodule(norm_name)
            assert isinstance(conv, nn.Conv2d)
            assert isinstance(norm, nn.BatchNorm2d)
            factor_C, offset_C = _factor_and_offset(norm)
            if conv.bias is not None:
                offset_C = offset_C + factor_C * conv.bias
            factor_C111 = factor_C.to(conv.weight.dtype).view(-1, 1, 1, 1)
            self.factors[f"{conv_name}.weight"] = factor_C111
            conv.weight = nn.Parameter(conv.weight * factor_C111, requires_grad=False)
            conv.bias = nn.Parameter(offset_C.to(conv.weight.dtype), requires_grad=False)
            self.net.set_submodule(norm_name, nn.Identity())

    @property
    def net(self) -> nn.Module:
        """The copy's network; its modules have the names that they have in the classifier."""
        return self.classifier.net

    def __call__(self, images_BCHW: Tensor, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """Logits (B, C) of pixels in [0, 1].

        Args:
            images_BCHW: Pixels.
            weights: Entries of the classifier's network's state dict in place of its own: weights of convolutions.
        """
        scaled = {
            key: value * self.factors[key] if key in self.factors else value for key, value in (weights or {}).items()
        }
        logits: Tensor = self.classifier(images_BCHW, scaled)
        return logits


def _factor_and_offset(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """What a BatchNorm layer in evaluation mode multiplies each channel by, and then adds, in float64."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    factor_C = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.affine:
        factor_C = factor_C * norm.weight
    offset_C = -norm.running_mean * factor_C
    return factor_C, offset_C + norm.bias if norm.affine else offset_C


def _pairs(net: nn.Module, classifier: Original, images_BCHW: Tensor) -> dict[str, str]:
    """Convolutions, by name, whose output is what one BatchNorm layer reads, with that layer's name."""
    outputs: dict[int, tuple[str, Tensor]] = {}  # the tensors are kept: a freed one's id may come again
    calls: list[str] = []
    pairs: dict[str, str] = {}

    def note_conv(name: str, output: Tensor) -> None:
        calls.append(name)
        outputs[id(output)] = name, output

    def note_norm(name: str, given: Tensor) -> None:
        calls.append(name)
        if id(given) in outputs:
            pairs[outputs[id(given)][0]] = name

    handles = []
    for name, module in net.named_modules():
        # Subclasses may do more than their names say.
        # A weight of several convolutions has no factor of its own.
        if type(module) is nn.Conv2d and len(classifier.places[f"{name}.weight"]) == 1:
            handles.append(module.register_forward_hook(lambda _m, _in, out, name=name: note_conv(name, out)))
        elif type(module) is nn.BatchNorm2d and module.track_running_stats:
            handles.append(module.register_forward_pre_hook(lambda _m, given, name=name: note_norm(name, given[0])))
    try:
        classifier(images_BCHW)
    finally:
        for handle in handles:
            handle.remove()
    return {conv: norm for conv, norm in pairs.items() if calls.count(conv) == calls.count(norm) == 1}
