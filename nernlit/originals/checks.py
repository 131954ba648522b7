"""What an original must be: plain float32 weights with finite values, and pixel statistics in [0, 1]."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from nernlit.errors import CheckpointError, UsageError

#: Parameters that stand in for a weight -> how to make it a plain parameter again.
_REPARAMETRIZED = {
    "weight_g": "torch.nn.utils.remove_weight_norm(net.{name})",
    "weight_u": "torch.nn.utils.remove_spectral_norm(net.{name})",
    "weight_mask": 'torch.nn.utils.prune.remove(net.{name}, "weight")',
}


def require_plain_weights(net: nn.Module, name: str) -> None:
    """Refuse a network whose weights are not float32 parameters that its state dict holds as they are used.

    Raises:
        UsageError: With the module and the call that helps.
    """
    entries = dict([*net.named_parameters(), *net.named_buffers()])
    lazy = [key for key, value in entries.items() if is_lazy(value)]
    if lazy:
        raise UsageError(
            f"{name!r} has weights without a shape yet ({lazy[0]}); run one batch through the network first."
        )
    for module_name, call in _computed_weights(net):
        raise UsageError(
            f"the weight of {module_name!r} in {name!r} is computed from other parameters in every forward pass, so it "
            f"cannot be replaced. Make it a plain parameter first: {call}."
        )
    empty = next((key for key, value in entries.items() if value.is_meta), None)
    if empty is not None:
        raise UsageError(f"{name!r} is on the meta device, {empty} has no values; load its weights first.")
    other = {
        key: value.dtype
        for key, value in entries.items()
        if value.dtype != torch.float32 and (value.is_floating_point() or value.is_complex())
    }
    for key, dtype in other.items():
        raise UsageError(
            f"{key} of {name!r} is {str(dtype).removeprefix('torch.')}, but an original's weights are float32; "
            "call net.float() first."
        )


def _computed_weights(net: nn.Module) -> Iterator[tuple[str, str]]:
    """Modules whose weight is no parameter of theirs, with the call that makes it one."""
    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d) and parametrize.is_parametrized(module, "weight"):
            yield name, f'torch.nn.utils.parametrize.remove_parametrizations(net.{name}, "weight")'
        own = {key for key, _ in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]}
        if isinstance(getattr(module, "weight", None), Tensor) and "weight" not in own:
            for key, call in _REPARAMETRIZED.items():
                if key in own:
                    yield name, call.format(name=name)
            if isinstance(module, nn.Conv2d):
                yield name, f"net.{name}.weight = torch.nn.Parameter(net.{name}.weight.detach())"


@torch.no_grad()
def require_finite_weights(net: nn.Module, source: str) -> None:
    """Refuse weights that are infinite or not a number, and negative variances.

    Raises:
        CheckpointError: With the first such tensor.
    """
    for key, value in net.state_dict().items():
        if not value.is_floating_point():
            continue
        wrong = ~value.isfinite()
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
        UsageError: If they are not for pixels in [0, 1] of so many channels.
    """
    return _statistic("mean", mean, channels, name), _statistic("std", std, channels, name)


def _statistic(what: str, values: Sequence[float], channels: int, name: str) -> Tensor:
    flag = f"--model.representation.original.{what}"
    try:
        numbers = torch.tensor([float(value) for value in values], dtype=torch.float32)
    except TypeError as error:
        raise UsageError(f"{what}={values!r} of {name!r}; expected a list of numbers ({flag}).") from error
    shown = _listed(numbers)
    if len(numbers) not in (1, channels):
        raise UsageError(
            f"{what} has {len(numbers)} numbers, but {name!r} takes images of {channels} channels; "
            f"pass {channels} numbers ({flag}), or the right in_chans."
        )
    if not bool(numbers.isfinite().all()) or bool((numbers < 0).any()):
        raise UsageError(f"{what}={shown} of {name!r}; expected finite numbers in [0, 1] ({flag}).")
    if bool((numbers > 1).any()):
        raise UsageError(
            f"{what}={shown} of {name!r} is in units of 0 to 255, but pixels are in [0, 1]; "
            f"pass {_listed(numbers / 255)} ({flag})."
        )
    if what == "std" and not bool(numbers.all()):
        raise UsageError(f"std={shown} of {name!r}; pixels are divided by it, so it must not be 0 ({flag}).")
    return numbers.view(-1, 1, 1)


def _listed(numbers: Tensor) -> str:
    return f"[{', '.join(f'{value:.4g}' for value in numbers.tolist())}]"
