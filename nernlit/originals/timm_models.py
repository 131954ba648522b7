"""Networks that timm creates by name, with errors that say what is wrong with the options."""

import difflib
import inspect
from collections.abc import Mapping
from typing import Any

import timm
from torch import nn

from nernlit.errors import CheckpointError, UsageError
from nernlit.originals import cifar_resnet, cifar_stem  # noqa: F401 - register our networks with timm

#: Arguments that `Original.arguments` must not contain: those of `timm.create_model`, and options of `Original`.
_RESERVED_ARGUMENTS = {*inspect.signature(timm.create_model).parameters, "num_classes", "in_chans", "features_only"}
#: A file must not make a network of a billion blocks.
_LARGEST_ARGUMENT = 16384


def require_name(name: str) -> None:
    """Refuse a name that timm does not know.

    Raises:
        UsageError: With the names that are closest.
    """
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), 3) or ["cifar_resnet20", "resnet18"]
        raise UsageError(
            f"timm has no model named {name!r}; did you mean {', '.join(close)}? If a module of "
            "yours registers it, import the module (on the command line: --import MODULE)."
        )


def timm_model(
    name: str,
    pretrained: bool = False,
    num_classes: int | None = None,
    in_chans: int | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> Any:
    """A network of `timm.create_model`.

    Raises:
        UsageError: If timm cannot create it with these options.
        CheckpointError: If its pretrained weights cannot be loaded.
    """
    require_counts(name, num_classes, in_chans)
    arguments = {} if arguments is None else arguments
    require_arguments(name, arguments)
    counts = {k: v for k, v in (("num_classes", num_classes), ("in_chans", in_chans)) if v is not None}
    options = {**arguments, **counts}
    try:
        return timm.create_model(name, pretrained=pretrained, **options)
    except Exception as error:  # timm's models and download backends raise many types
        reason = (str(error) or type(error).__name__).splitlines()[0]
        if pretrained:
            raise CheckpointError(
                f"the pretrained weights of {name!r} could not be loaded: {reason} "
                "Without an internet connection, pass checkpoint=FILE instead of pretrained=true."
            ) from error
        raise UsageError(f"timm cannot create {name!r} with {options or 'its default options'}: {reason}") from error


def require_counts(name: str, num_classes: int | None, in_chans: int | None) -> None:
    """Refuse numbers of classes below 2 and of channels below 1.

    Raises:
        UsageError: With the option and its value.
    """
    for what, count, least in (("num_classes", num_classes, 2), ("in_chans", in_chans, 1)):
        if count is not None and (not isinstance(count, int) or isinstance(count, bool) or count < least):
            raise UsageError(f"{what}={count!r} for {name!r}; expected an integer of at least {least}.")


def require_arguments(name: str, arguments: Mapping[str, Any]) -> None:
    """Refuse arguments that do not describe the architecture: a header of a .nern file must not load files or run code.

    Raises:
        UsageError: With the argument and its value.
    """
    if not isinstance(arguments, Mapping):
        raise UsageError(f"arguments={arguments!r} of {name!r}; expected a mapping from argument names to values.")
    for key, value in arguments.items():
        if key in _RESERVED_ARGUMENTS or key.startswith("pretrained"):
            raise UsageError(
                f"arguments of {name!r} has {key!r}; expected arguments of its architecture. Classes, channels and "
                "pretrained weights are options of the original itself."
            )
        numbers = value if isinstance(value, list | tuple) else [value]
        for number in numbers:
            if not isinstance(number, bool | int | float | str | None):
                raise UsageError(f"arguments of {name!r}: {key}={value!r}; expected a number, text or a list of them.")
            if isinstance(number, int | float) and not abs(number) <= _LARGEST_ARGUMENT:
                raise UsageError(f"arguments of {name!r}: {key}={value!r}; expected at most {_LARGEST_ARGUMENT}.")


def image_channels(net: nn.Module) -> int | None:
    """The number of image channels; the network may reshape images before its first convolution."""
    stated = getattr(net, "in_chans", None)
    if isinstance(stated, int) and stated > 0:
        return stated
    channels = [module.in_channels for module in net.modules() if isinstance(module, nn.Conv2d)][:1]
    config = getattr(net, "pretrained_cfg", None) or getattr(net, "default_cfg", None)
    if isinstance(config, Mapping) and config.get("input_size"):
        # The smaller one: a stem that rearranges pixels has more input channels, and timm's configuration states 3 even
        # for a network created with `in_chans=1`.
        channels.append(int(config["input_size"][0]))
    return min(channels, default=None)
