"""The inputs of `nernlit compress` and `compare`: a trained network and images."""

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError, safe_open

from nernlit.cli.arguments import take_options
from nernlit.cli.resume import say
from nernlit.cli.runs import Run
from nernlit.coding import is_nern
from nernlit.errors import CheckpointError, UsageError
from nernlit.originals import Original
from nernlit.storage.container import read_container

#: Prefix of the options of the original in a fit.
ORIGINAL = "--model.representation.original"


def require_images(data_options: Sequence[str]) -> None:
    """Check that data are named.

    Raises:
        UsageError: If they are not.
    """
    if not any(option.startswith("--data=") for option in data_options):
        raise UsageError(
            "images are needed: --data FolderDataModule --data.root DIR for a folder with train/<class>/<image>, or "
            "the DataModule of a dataset, such as CIFAR10DataModule."
        )


def network_options(net: str, name: str | None, fit_options: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """The options of `Original` for a file of weights, the folder of a run or the name of a timm model.

    Args:
        net: The file, the folder (its newest best checkpoint is taken) or the name.
        name: timm name of the network, for a file that does not say it.
        fit_options: Options of the fit; those of the original (`num_classes`, `mean`, ...) are taken from them.

    Returns:
        Name -> value as on the command line, and the other options of the fit.

    Raises:
        CheckpointError: If a folder holds no checkpoint.
        UsageError: If the architecture of a file's weights is not known, or the original has no such option.
    """
    path = Path(net)
    if path.is_dir():
        found = Run.open(path).checkpoint
        say(f"nernlit: {net}: taking {found}")
        net, path = str(found), found
    if path.exists():
        name = name or _stated_name(path)
        if name is None:
            raise UsageError(f"{net} does not say which network its weights are of; pass --network NAME (timm's name).")
        options = {"name": name, "checkpoint": net}
    elif name is not None or path.suffix in (".safetensors", ".pt", ".pth", ".th", ".ckpt", ".nern"):
        raise UsageError(f"no file at {net}; expected a file of weights, or the name of a timm model.")
    else:
        options = {"name": net, "pretrained": "true"}
    others, own = take_options(fit_options, ORIGINAL)
    known = inspect.signature(Original).parameters
    for option in own:
        flag, _, value = option.partition("=")
        key = flag.removeprefix(f"{ORIGINAL}.")
        if key not in known or key in options:
            allowed = ", ".join(each for each in known if each not in options)
            raise UsageError(f"{option}: expected {ORIGINAL}.NAME=VALUE, where NAME is one of {allowed}.")
        options[key] = value
    return options, others


def _stated_name(path: Path) -> str | None:
    """The timm name in a .nern file, or in the metadata of a safetensors file."""
    if is_nern(path):
        network = read_container(path).header.get("network")
        return str(network["name"]) if isinstance(network, dict) and "name" in network else None
    try:
        with safe_open(path, "pt") as file:
            return (file.metadata() or {}).get("timm_name")
    except (SafetensorError, OSError):
        return None


def original_of(options: Mapping[str, str]) -> Original:
    """The network that `network_options` describes.

    Raises:
        CheckpointError: If the weights are not those of such a network.
    """
    texts = ("name", "checkpoint")
    values: dict[str, Any] = {key: text if key in texts else yaml.safe_load(text) for key, text in options.items()}
    try:
        return Original(**values)
    except CheckpointError as error:
        if "num_classes" in values or "num_classes" not in str(error):
            raise
        raise CheckpointError(f"{error} For a network with N classes pass {ORIGINAL}.num_classes N.") from error
