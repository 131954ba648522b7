"""Checks of an original: plain, finite float32 weights, and pixel statistics in [0, 1]."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from nernlit.errors import CheckpointError, DataError, UsageError
from nernlit.utilities.text import abbreviated

#: Suffix of the parameters and buffers that torch's reparametrizations add -> the call that removes them.
_REPARAMETRIZATIONS = {
    "_g": "torch.nn.utils.remove_weight_norm(net.{module})",
    "_u": "torch.nn.utils.remove_spectral_norm(net.{module})",
    "_mask": 'torch.nn.utils.prune.remove(net.{module}, "{tensor}")',
}
#: Wrappers in which weights cannot be replaced -> the network to pass instead.
_WRAPPERS = {
    nn.DataParallel: "inside it, net.module",
    nn.parallel.DistributedDataParallel: "inside it, net.module",
    torch.jit.ScriptModule: "that it was made from",
}


def require_plain_weights(net: nn.Module, name: str) -> None:
    """Check that all weights are plain float32 parameters that the forward pass uses as they are in the state dict.

    Raises:
        UsageError: If they are not; the message names the module and the call that converts it.
    """
    for kind, instead in _WRAPPERS.items():
        if isinstance(net, kind):
            raise UsageError(f"{name!r} is a {kind.__name__}; pass the network {instead}.")
    if "_orig_mod" in net._modules:  # its class is in a module that takes seconds to import
        raise UsageError(f"{name!r} is compiled; pass the network that it was compiled from, net._orig_mod.")
    _require_plain_state_dict(net, name)
    entries = dict([*net.named_parameters(), *net.named_buffers()])
    lazy = [key for key, value in entries.items() if is_lazy(value)]
    if lazy:
        raise UsageError(
            f"{name!r} has weights without a shape yet ({lazy[0]}); run one batch through the network first."
        )
    for tensor, call in _computed_tensors(net):
        raise UsageError(
            f"{tensor} of {name!r} is computed from other parameters in every forward pass, so it cannot be replaced. "
            f"Make it a plain parameter first: {call}."
        )
    for key, value in entries.items():
        if value.is_meta:
            raise UsageError(f"{name!r} is on the meta device: {key} has no values; load its weights first.")
    for key, parameter in net.named_parameters():
        if parameter.dtype != torch.float32 and (parameter.is_floating_point() or parameter.is_complex()):
            raise UsageError(
                f"{key} of {name!r} is {str(parameter.dtype).removeprefix('torch.')}, but an original's weights are "
                "float32; call net.float() first."
            )


def _require_plain_state_dict(net: nn.Module, name: str) -> None:
    """Check that a network's state dict consists of its parameters and persistent buffers.

    Raises:
        UsageError: If it has an extra state that is no tensor, or hooks that rename or leave out entries.
    """
    state, own = net.state_dict(keep_vars=True), set()
    for path, module in net.named_modules(remove_duplicate=False):
        buffers = module._buffers.keys() - module._non_persistent_buffers_set
        held = {**module._parameters, **{key: module._buffers[key] for key in buffers}}
        own |= {f"{path}.{key}".removeprefix(".") for key, value in held.items() if value is not None}
    for key, value in state.items():
        if not isinstance(value, Tensor):
            raise UsageError(
                f"{key} in the state dict of {name!r} is a {type(value).__name__}, and a .nern file holds "
                "tensors only; remove it (the module's get_extra_state)."
            )
    extra = {key for key in state if key.rpartition(".")[2] == "_extra_state"}
    if changed := sorted((state.keys() - extra) ^ own):
        raise UsageError(
            f"the state dict of {name!r} does not have the names of its tensors ({abbreviated(changed, 3)}); remove "
            "the state-dict hooks that rename them."
        )


def _computed_tensors(net: nn.Module) -> Iterator[tuple[str, str]]:
    """Tensors that a network computes in every forward pass, with the call that makes each a plain parameter."""
    for name, module in net.named_modules():
        own = {key for key, _ in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]}
        for tensor in [key for key, value in vars(module).items() if isinstance(value, Tensor)]:
            for ending, call in _REPARAMETRIZATIONS.items():
                if tensor + ending in own:
                    yield f"{name}.{tensor}", call.format(module=name, tensor=tensor)
        if isinstance(module, nn.Conv2d) and "weight" not in own:
            if parametrize.is_parametrized(module, "weight"):
                yield f"{name}.weight", f'torch.nn.utils.parametrize.remove_parametrizations(net.{name}, "weight")'
            yield f"{name}.weight", f"net.{name}.weight = torch.nn.Parameter(net.{name}.weight.detach())"


def require_classifier(what: str, name: str, num_classes: int) -> None:
    """Refuse to run a network on images if it is not an image classifier.

    Raises:
        UsageError: If the number of classes is 0.
    """
    if not num_classes:
        raise UsageError(
            f"{what} needs an image classifier, but {name!r} was given without num_classes, mean and std; pass them to "
            "Original.from_module. Without them, Recon-only (with `data: null` or NoImages), the analyses of weights "
            "and .nern files work."
        )


def mask_names(net: nn.Module) -> set[str]:
    """The buffers that may be infinite: all but running statistics. Masks of attention are."""
    names = {name for name, _ in net.named_buffers(remove_duplicate=False)}
    return {name for name in names if not name.rpartition(".")[2].startswith("running_")}


@torch.no_grad()
def require_finite_weights(net: nn.Module, source: str) -> None:
    """Check that all weights are finite and no running variance is negative. Masks may be infinite.

    Raises:
        CheckpointError: If not; the message names the first such tensor.
    """
    masks = mask_names(net)
    for key, value in net.state_dict().items():
        if not value.is_floating_point():
            continue
        value = value if value.element_size() > 1 else value.float()  # types of 8 bits have no `isfinite`
        wrong = value.isnan() if key in masks else ~value.isfinite()
        if bool(wrong.any()):
            raise CheckpointError(
                f"{int(wrong.sum())} of {value.numel()} values of {key} in {source} are not finite "
                f"(first: {float(value[wrong][0])}); pass weights of a training that did not diverge."
            )
        if key.endswith("running_var") and bool((value < 0).any()):
            raise CheckpointError(
                f"{key} in {source} has negative variances (lowest: {float(value.min()):g}); the file is damaged."
            )


def pixel_statistics(mean: Sequence[float], std: Sequence[float], channels: int, name: str) -> tuple[Tensor, Tensor]:
    """The mean and the standard deviation, one number or one per channel, as (C, 1, 1) float32.

    Raises:
        UsageError: If they are not valid for pixels in [0, 1] with this number of channels.
    """
    return _statistic("mean", mean, channels, name), _statistic("std", std, channels, name)


def _statistic(what: str, values: Sequence[float], channels: int, name: str) -> Tensor:
    try:
        numbers = torch.tensor([float(value) for value in values], dtype=torch.float32)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{what}={values!r} of {name!r}; expected a list of numbers.") from error
    shown = _listed(numbers)
    if len(numbers) not in (1, channels):
        raise UsageError(
            f"{what} has {len(numbers)} numbers, but {name!r} takes images of {channels} channels; "
            f"pass {'1' if channels == 1 else f'1 or {channels}'}, or the right in_chans."
        )
    if not bool(numbers.isfinite().all()) or bool((numbers < 0).any()):
        raise UsageError(f"{what}={shown} of {name!r}; expected finite numbers in [0, 1].")
    if bool((numbers > 1).any()):
        raise UsageError(
            f"{what}={shown} of {name!r} is in units of 0 to 255, but pixels are in [0, 1]; "
            f"pass {what}={_listed(numbers / 255)}."
        )
    if what == "std" and not bool(numbers.all()):
        raise UsageError(f"std={shown} of {name!r}; pixels are divided by it, so it must not be 0.")
    return numbers.view(-1, 1, 1)


def _listed(numbers: Tensor) -> str:
    return f"[{', '.join(f'{value:.4g}' for value in numbers.tolist())}]"


#: Pixels outside of this range are not in [0, 1] up to augmentation and noise.
_PIXELS = (-0.5, 1.5)


def require_pixels(images_BCHW: Tensor) -> None:
    """Check that images are pixels in [0, 1], and not normalized or in units of 0 to 255.

    Raises:
        DataError: If they are integers, or far outside.
    """
    if not images_BCHW.is_floating_point() or images_BCHW.dim() != 4:
        kind = str(images_BCHW.dtype).removeprefix("torch.")
        raise DataError(
            f"images are {kind} of shape {tuple(images_BCHW.shape)}; expected floating-point pixels (B, C, H, W) in "
            "[0, 1]."
        )
    low, high = (float(value) for value in images_BCHW.aminmax())
    if not (low >= _PIXELS[0] and high <= _PIXELS[1]):  # they may be NaN
        raise DataError(
            f"the pixels of a batch are from {low:.3g} to {high:.3g}; expected pixels in [0, 1], which the original "
            "normalizes itself."
        )
