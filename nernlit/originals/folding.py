"""BatchNorm of a frozen network is one factor and one offset a channel: the convolution before it can apply both."""

import copy
import glob
from collections import Counter
from collections.abc import Collection, Mapping
from typing import final

import torch
from torch import Tensor, nn

from nernlit.originals.original import Original
from nernlit.originals.taps import FeatureTaps
from nernlit.originals.trace import Trace


@final
class Folded:
    """A frozen classifier that answers as the given one does, without the work of its BatchNorm layers.

    In a ResNet's training step that work takes a fifth of the time. Gradients flow to the weights of a call as they do
    in the classifier itself. It is a copy, which no module owns: it is in no checkpoint, and does not follow later
    changes of the classifier.

    A BatchNorm layer is folded only where nothing but it can read what the convolution gives, as a trace of the network
    shows; the values of weights and images do not matter. All others stay.

    Args:
        classifier: In evaluation mode.
        images_BCHW: Pixels of the shape to come; their values are not looked at.
        read: Names of modules whose outputs are looked at, or with `:input` behind them their inputs, and hence must
            stay what they are; see `FeatureTaps.taps`.
    """

    def __init__(self, classifier: Original, images_BCHW: Tensor, read: Collection[str] = ()) -> None:
        # The first steps of two callers may be under autocast, or make tensors that autograd refuses.
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(images_BCHW.device.type, enabled=False):
            pairs = _proven_pairs(classifier, images_BCHW, read)
            self.classifier = copy.deepcopy(classifier)
            self.factors = _fold(self.classifier.net, pairs)

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


def _fold(net: nn.Module, pairs: Mapping[str, str]) -> dict[str, Tensor]:
    """Fold each convolution's BatchNorm layer into it, and return the factors (O, 1, 1, 1) of the weights by key."""
    factors = {}
    for conv_name, norm_name in pairs.items():
        conv, norm = net.get_submodule(conv_name), net.get_submodule(norm_name)
        assert isinstance(conv, nn.Conv2d)
        assert isinstance(norm, nn.BatchNorm2d)
        factor_C, offset_C = _factor_and_offset(norm)
        if conv.bias is not None:
            offset_C = offset_C + factor_C * conv.bias
        factor_C111 = factor_C.to(conv.weight.dtype).view(-1, 1, 1, 1)
        factors[f"{conv_name}.weight"] = factor_C111
        conv.weight = nn.Parameter(conv.weight * factor_C111, requires_grad=False)
        conv.bias = nn.Parameter(offset_C.to(conv.weight.dtype), requires_grad=False)
        net.set_submodule(norm_name, nn.Identity())
    return factors


def _proven_pairs(classifier: Original, images_BCHW: Tensor, read: Collection[str]) -> dict[str, str]:
    """Convolutions, by name, whose output one BatchNorm layer alone reads, with that layer's name."""
    blueprint = copy.deepcopy(classifier).to("meta")
    taps = FeatureTaps(blueprint.net, [glob.escape(name) for name in read])
    convs, norms = _foldable(blueprint)
    try:
        before = _traced(blueprint, images_BCHW, taps, {**convs, **norms})
        pairs, folded = {}, set()
        for conv_name, conv in convs.items():
            for norm_name, norm in norms.items():
                operation = _only_reader(before, conv_name, conv, norm_name, norm)
                if operation is not None:
                    pairs[conv_name] = norm_name
                    folded.add(operation)
        _fold(blueprint.net, pairs)
        taps = FeatureTaps(blueprint.net, [glob.escape(name) for name in read])
        after = _traced(blueprint, images_BCHW, taps, {})
    except Exception:  # it cannot be traced: its course depends on values, or an operation has no meta version
        return {}
    # The network may look at a layer in other ways than by calling it.
    remaining = [name for number, name in enumerate(before.operations) if number not in folded]
    return pairs if after.operations == remaining else {}


def _traced(classifier: Original, images_BCHW: Tensor, taps: FeatureTaps, modules: Mapping[str, nn.Module]) -> Trace:
    trace = Trace(modules)
    with taps.collect():  # it copies what it collects, which counts as reading
        trace.run(classifier, images_BCHW)
    return trace


def _foldable(classifier: Original) -> tuple[dict[str, nn.Conv2d], dict[str, nn.BatchNorm2d]]:
    """Convolutions and BatchNorm layers, by name, that are nothing more and stand in one place only."""
    names = Counter(module for _, module in classifier.net.named_modules(remove_duplicate=False))
    convs, norms = {}, {}
    for name, module in classifier.net.named_modules():
        # There is no public way to ask for hooks. They may change what a layer gives, and are lost with it.
        if names[module] > 1 or module._forward_hooks or module._forward_pre_hooks:
            continue
        # Subclasses may do more than their names say. A weight of several convolutions has no factor of its own.
        if type(module) is nn.Conv2d and len(classifier.places[f"{name}.weight"]) == 1:
            convs[name] = module
        elif type(module) is nn.BatchNorm2d and module.running_mean is not None and not module.training:
            norms[name] = module
    return convs, norms


def _only_reader(trace: Trace, conv_name: str, conv: nn.Module, norm_name: str, norm: nn.Module) -> int | None:
    """The number of a BatchNorm layer's operation, if it alone reads a convolution's output; both run once."""
    if not len(trace.calls[conv_name]) == len(trace.calls[norm_name]) == 1:
        return None
    (_, maps), (given, result) = trace.calls[conv_name][0], trace.calls[norm_name][0]
    if given is not maps:
        return None
    of_conv, of_norm = trace.source(maps), trace.source(result)
    own = [(of_conv, tensor) for tensor in _tensors_of(conv)] + [(of_norm, tensor) for tensor in _tensors_of(norm)]
    alone = trace.readers(maps) == {of_norm} and all(trace.readers(tensor) <= {of} for of, tensor in own)
    return of_norm if alone else None


def _tensors_of(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]
