"""The inputs of `nernlit compress` and `compare`: a trained network and images."""

import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError, safe_open

from nernlit.cli.arguments import refuse_own_options, split_options, without_init_args
from nernlit.cli.configs import FOLDER, config_parts, expand_bases
from nernlit.cli.resume import say
from nernlit.cli.runs import Run
from nernlit.coding import is_nern
from nernlit.errors import CheckpointError, UsageError
from nernlit.originals import Original
from nernlit.storage.checkpoint import read_checkpoint
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
            "no dataset is given: pass --data FolderDataModule --data.root DIR for a folder train/<class>/<image>, or "
            "the DataModule of a dataset, such as CIFAR10DataModule."
        )


def refuse_test_options(fit_options: Sequence[str]) -> None:
    """Refuse options of the number of epochs and of the best checkpoint, and configuration files with data options.

    Args:
        fit_options: Further options of the fits.

    Raises:
        UsageError: If there is such an option or file.
    """
    refuse_own_options({"--trainer.max_epochs": "pass --epochs instead"}, fit_options)
    if schedule := split_options(fit_options, "--schedule")[1]:
        raise UsageError(f"{schedule[0]}: this command has one schedule; leave it out.")
    if of_best := split_options(fit_options, "--best_checkpoint")[1]:
        raise UsageError(f"{of_best[0]}: files have the network of a fit's end, not its best one; leave it out.")
    for part in config_parts(expand_bases(fit_options)):
        options = part.options()
        if options.get("data"):
            raise UsageError(
                f"{part.file} has options of the data, which the test after the fit would not have; pass them on the "
                "command line: --data CLASS --data.root DIR."
            )
        if "max_epochs" in (options.get("trainer") or {}):
            raise UsageError(f"{part.file} sets trainer.max_epochs, which this command sets; pass --epochs instead.")


def refuse_own_options_and_files(own: Mapping[str, str], fit_options: Sequence[str]) -> None:
    """Refuse options that a command sets itself, on the command line and in the user's configuration files.

    Args:
        own: Name of an option in its short form -> what to do instead.
        fit_options: Further options of the fits.

    Raises:
        UsageError: With the option.
    """
    refuse_own_options(own, fit_options)
    for part in config_parts(expand_bases(fit_options)):
        if FOLDER in part.file.resolve().parents:
            continue  # a shipped one
        for name in _option_names(part.options()):
            if (option := without_init_args(f"--{name}")) in own:
                raise UsageError(f"{part.file}: {name}: this command sets {option}; {own[option]}.")


def _option_names(options: Any, above: str = "") -> Iterator[str]:
    """The names, with dots, of the options in nested values."""
    if not isinstance(options, dict):
        yield above
        return
    for key, value in options.items():
        yield from _option_names(value, f"{above}.{key}".removeprefix("."))


def network_options(net: str, name: str | None, fit_options: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """The options of `Original` for a file of weights, the folder of a run or the name of a timm model.

    Args:
        net: The file, the folder (its newest best checkpoint is taken) or the name.
        name: timm name of the network, for a file that does not say it.
        fit_options: Options of the fit; those of the original (`num_classes`, `mean`, ...) are taken from them.

    Returns:
        Name -> value as on the command line, and the other options of the fit.

    Raises:
        CheckpointError: If a checkpoint is damaged.
        UsageError: If a folder holds none, the architecture of a file's weights is not known, or the original has no
            such option.
    """
    path = Path(net)
    if path.is_dir():
        found = Run.open(path).checkpoint
        say(f"nernlit: {net}: taking {found}")
        net, path = str(found), found
    if path.exists():
        try:
            options = _stated(path)
        except CheckpointError:
            if name is None:
                raise
            options = {}  # weights of another program; the original says if they are damaged
        if name is not None and options.get("name") != name:
            options = {"name": name}
        if "name" not in options:
            raise UsageError(
                f"{net} does not contain the name of its network; pass --network NAME (a timm model name)."
            )
        options["checkpoint"] = net
    elif name is not None or path.suffix in (".safetensors", ".pt", ".pth", ".th", ".ckpt", ".nern"):
        raise UsageError(f"no file at {net}; expected a file of weights, or the name of a timm model.")
    else:
        options = {"name": net, "pretrained": "true"}
    named = options.keys() & {"name", "checkpoint", "pretrained"}
    others, own = split_options(fit_options, ORIGINAL)
    known = inspect.signature(Original).parameters
    for option in own:
        flag, _, value = option.partition("=")
        key = flag.removeprefix(f"{ORIGINAL}.")
        if key not in known or key in named:
            allowed = ", ".join(each for each in known if each not in named)
            raise UsageError(f"{option}: expected {ORIGINAL}.NAME=VALUE, where NAME is one of {allowed}.")
        options[key] = value
    return options, others


def _stated(path: Path) -> dict[str, str]:
    """What a file says of its network: the name in a .nern file and in the metadata of a safetensors file; all options
    of the original in a checkpoint of the fit that trained it. Name -> value as on the command line.

    Raises:
        CheckpointError: If a checkpoint is damaged.
        UsageError: If it is of a fit that does not train a network.
    """
    if is_nern(path):
        network = read_container(path).header.get("network")
        return {"name": str(network["name"])} if isinstance(network, dict) and "name" in network else {}
    if path.suffix == ".ckpt":
        options = read_checkpoint(path)["hyper_parameters"]
        if "representation" in options:
            raise UsageError(
                f"{path} is a checkpoint of a predictor, not of a network. "
                f"Export it (`nernlit export {path} -o FILE.nern`) "
                f"and pass that file, or pass the original network."
            )
        original = options.get("original")
        known = inspect.signature(Original).parameters.keys() - {"checkpoint", "pretrained"}
        stated = original.items() if isinstance(original, dict) else ()
        return {
            key: str(value) if key == "name" else json.dumps(value)
            for key, value in stated
            if key in known and value is not None
        }
    with suppress(SafetensorError, OSError), safe_open(path, "pt") as file:
        name = (file.metadata() or {}).get("timm_name")
        return {} if name is None else {"name": name}
    return {}


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
