"""BatchNorm folding: in a frozen network, a BatchNorm layer's scale and shift move into the convolution before it."""

import copy
import glob
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Self, final

import torch
from torch import Tensor, nn

from nernlit.originals.original import Original
from nernlit.originals.taps import FeatureTaps
from nernlit.originals.trace import Trace


@final
class Folded:
    """A copy of a frozen classifier with its BatchNorm layers folded into the convolutions; the logits do not change.

    BatchNorm takes a fifth of the time of a ResNet's training step. Gradients flow to the weights of a call as in the
    classifier itself. The copy is not a submodule of any module: it is in no checkpoint, and later changes of the
    classifier do not reach it.

    A BatchNorm layer is folded only if a trace of the network shows that nothing else reads the convolution's output;
    this does not depend on the values of weights and images. All other BatchNorm layers are kept.

    Args:
        classifier: A classifier in evaluation mode.
        images_BCHW: A batch with the shape of later inputs; only its shape is used, for the trace.
        read: Names of modules whose outputs (or, with the suffix `:input`, inputs) are collected and therefore must not
            change; see `FeatureTaps.taps`.
    """

    def __init__(self, classifier: Original, images_BCHW: Tensor, read: Collection[str] = ()) -> None:
        # The caller may be inside autocast or inference mode, whose tensors autograd does not accept.
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(images_BCHW.device.type, enabled=False):
            pairs = _foldable_pairs(classifier, images_BCHW, read)
            self.classifier = copy.deepcopy(classifier)
            self.folds = [_Fold.from_modules(self.classifier.net, conv, norm) for conv, norm in pairs.items()]
            _fold(self.classifier.net, self.folds)
            biases = [f"{conv}.bias" for conv in pairs]
            self.classifier.places = {**self.classifier.places, **{name: (name,) for name in biases}}

    @property
    def net(self) -> nn.Module:
        """The copy's network; its modules have the same names as the classifier's."""
        return self.classifier.net

    def __call__(self, images_BCHW: Tensor, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """Logits (B, C) of pixels in [0, 1].

        Args:
            images_BCHW: Pixels.
            weights: State-dict key -> weight, to be used instead of the classifier's own.
        """
        used = dict(weights or {})
        for fold in self.folds:
            fold.apply(used)
        logits: Tensor = self.classifier(images_BCHW, used)
        return logits


@dataclass(frozen=True)
class _Fold:
    """A convolution and the BatchNorm layer that is folded into it; tensors have one number per channel.

    Attributes:
        conv: Name of the convolution.
        norm: Name of the BatchNorm layer.
        factor: What the BatchNorm layer multiplies by, without its own weight.
        mean: What it subtracts.
        conv_weight: The convolution's weight.
        conv_bias: Its bias, zeros if it has none.
        weight: The BatchNorm layer's own weight.
        bias: Its own bias.
    """

    conv: str
    norm: str
    factor: Tensor
    mean: Tensor
    conv_weight: Tensor
    conv_bias: Tensor
    weight: Tensor
    bias: Tensor

    @classmethod
    def from_modules(cls, net: nn.Module, conv_name: str, norm_name: str) -> Self:
        """The fold of two modules of a network that are not folded yet."""
        conv, norm = net.get_submodule(conv_name), net.get_submodule(norm_name)
        assert isinstance(conv, nn.Conv2d)
        assert isinstance(norm, nn.BatchNorm2d)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        factor = (norm.running_var.double() + norm.eps).rsqrt().to(conv.weight.dtype)
        mean = norm.running_mean
        conv_bias = torch.zeros_like(mean) if conv.bias is None else conv.bias
        weight = norm.weight if norm.affine else torch.ones_like(mean)
        bias = norm.bias if norm.affine else torch.zeros_like(mean)
        return cls(conv_name, norm_name, factor, mean, conv.weight, conv_bias, weight, bias)

    def apply(self, weights: dict[str, Tensor]) -> None:
        """Replace the entries of the convolution and of the BatchNorm layer by those of the folded convolution."""
        conv_weight, conv_bias = f"{self.conv}.weight", f"{self.conv}.bias"
        norm_weight, norm_bias = f"{self.norm}.weight", f"{self.norm}.bias"
        is_given = bool({conv_bias, norm_weight, norm_bias} & weights.keys())
        if conv_weight not in weights and not is_given:
            return
        factor = self.factor * weights.pop(norm_weight, self.weight)
        bias = weights.pop(norm_bias, self.bias)
        weights[conv_weight] = weights.get(conv_weight, self.conv_weight) * factor.view(-1, 1, 1, 1)
        if is_given:
            weights[conv_bias] = bias + (weights.get(conv_bias, self.conv_bias) - self.mean) * factor


def _fold(net: nn.Module, folds: Iterable[_Fold]) -> None:
    """Fold each BatchNorm layer into its convolution."""
    for fold in folds:
        entries = {f"{fold.conv}.weight": fold.conv_weight, f"{fold.conv}.bias": fold.conv_bias}
        fold.apply(entries)
        conv = net.get_submodule(fold.conv)
        for name in ("weight", "bias"):
            setattr(conv, name, nn.Parameter(entries[f"{fold.conv}.{name}"], requires_grad=False))
        net.set_submodule(fold.norm, nn.Identity())


def _foldable_pairs(classifier: Original, images_BCHW: Tensor, read: Collection[str]) -> dict[str, str]:
    """Convolution name -> name of the BatchNorm layer that is the only reader of its output."""
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
        _fold(blueprint.net, [_Fold.from_modules(blueprint.net, conv, norm) for conv, norm in pairs.items()])
        taps = FeatureTaps(blueprint.net, [glob.escape(name) for name in read])
        after = _traced(blueprint, images_BCHW, taps, {})
    except Exception:  # not traceable: control flow depends on values, or an operation has no meta implementation
        return {}
    # The network may use a layer other than by calling it, which changes the operations after folding.
    remaining = [name for number, name in enumerate(before.operations) if number not in folded]
    return pairs if after.operations == remaining else {}


def _traced(classifier: Original, images_BCHW: Tensor, taps: FeatureTaps, modules: Mapping[str, nn.Module]) -> Trace:
    trace = Trace(modules)
    with taps.collect():  # collecting copies the tensor, so the trace records it as a reader
        trace.run(classifier, images_BCHW)
    return trace


def _foldable(classifier: Original) -> tuple[dict[str, nn.Conv2d], dict[str, nn.BatchNorm2d]]:
    """The convolutions and BatchNorm layers, by name, without hooks or subclassing, that have one name each."""
    names = Counter(module for _, module in classifier.net.named_modules(remove_duplicate=False))
    convs, norms = {}, {}
    for name, module in classifier.net.named_modules():
        # Hooks may change a layer's output, and folding would drop them. There is no public way to list them.
        if names[module] > 1 or module._forward_hooks or module._forward_pre_hooks:
            continue
        # A tensor that several layers share cannot be changed for one of them.
        if any(
            len(classifier.places[f"{name}.{key}".removeprefix(".")]) > 1
            for key, _ in module.named_parameters(recurse=False)
        ):
            continue
        # Subclasses may behave differently.
        if type(module) is nn.Conv2d:
            convs[name] = module
        elif type(module) is nn.BatchNorm2d and module.running_mean is not None and not module.training:
            norms[name] = module
    return convs, norms


def _only_reader(trace: Trace, conv_name: str, conv: nn.Module, norm_name: str, norm: nn.Module) -> int | None:
    """The number of a BatchNorm layer's operation if it alone reads the convolution's output and both run once."""
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
