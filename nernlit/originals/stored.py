"""Originals in .nern files: how the header describes one, and the one that a file decodes to."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save
from torch import Tensor, nn

from nernlit.coding import NernFile, unreadable
from nernlit.errors import CheckpointError, FileFormatError
from nernlit.originals.original import Original
from nernlit.originals.timm_models import timm_model
from nernlit.storage.matching import mismatches
from nernlit.storage.weights import load_strictly
from nernlit.utilities.sharing import names_of_weights, with_versions

_ARCHITECTURE = {"name", "num_classes", "in_chans", "arguments"}


def description(original: Original) -> dict[str, Any]:
    """What the header of a .nern file says of an original, in primitives.

    `original_bytes` is the size of its weights as a safetensors file.
    """
    state, names = original.net.state_dict(), names_of_weights(original.net)
    # Copies: safetensors refuses tensors that share memory.
    stored = {
        key: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for key, value in state.items()
        if names[key][0] == key
    }
    return {
        "network": original.architecture,
        "network_class": original.name,
        "num_classes": original.num_classes or None,
        "in_chans": original.in_chans or None,
        "class_names": list(original.class_names),
        "mean": _shortest(original.mean) or None,
        "std": _shortest(original.std) or None,
        "original_bytes": len(save(stored)),
    }


def _shortest(numbers: Tensor) -> list[float]:
    """Numbers with as few digits as their float32 values need."""
    return [float(str(number)) for number in numbers.flatten().float().cpu().numpy()]


def decoded_original(file: NernFile, net: nn.Module | None = None) -> Original:
    """The reconstructed network of a .nern file.

    Args:
        file: The file.
        net: A network of the file's architecture, for one that timm cannot make. Its weights are replaced.

    Raises:
        FileFormatError: If the file needs a network that is not given, or does not fit its network.
    """
    header, state = file.header, file.state_dict()
    with unreadable(file.path):
        if net is not None:
            original = Original.from_module(
                net, header["num_classes"], header["mean"], header["std"], header["in_chans"]
            )
            original.name, original.architecture = str(header["network_class"]), header["network"]
        else:
            original = _timm_original(file, state)
        load_strictly(original.net, with_versions(state, original.net.state_dict()), str(file.path))
        names = names_of_weights(original.net)
        for layer in file.layout.layers:
            if names[layer.key] != (layer.key, *layer.aliases):
                raise FileFormatError(
                    f"{file.path} does not fit {original.name}: {layer.key} has other names in this network."
                )
        original.set_source(file)
    return original


def fitted_original(file: NernFile, weights: str | Path) -> Original:
    """The original that a .nern file was written from, which the file does not hold.

    Args:
        file: The file.
        weights: File of the original's weights.

    Raises:
        CheckpointError: If the weights cannot be read, or are those of another original.
        FileFormatError: If timm cannot make the network, or the file does not decode to what it was written from.
    """
    state = file.state_dict()
    with unreadable(file.path):
        _timm_original(file, state)  # refuses a network that the file does not fit, whatever the weights are
    header = file.header
    original = Original(**header["network"], checkpoint=str(weights), mean=header["mean"], std=header["std"])
    stored, found = file.checks.original, original.fingerprint()
    if found != stored:
        raise CheckpointError(
            f"{weights} is not the original of {file.path}: the file was fitted to weights with SHA-256 "
            f"{stored[:12]}..., and these have {found[:12]}...; pass the weights that it was fitted to."
        )
    original.class_names = tuple(str(name) for name in header["class_names"])
    return original


def _timm_original(file: NernFile, state: Mapping[str, Tensor]) -> Original:
    """A network of the file's architecture with random weights."""
    architecture = file.header["network"]
    if architecture is None:
        raise FileFormatError(
            f"{file.path} holds a {str(file.header['network_class'])[:100]} that timm cannot make; pass a network of "
            "this architecture: nernlit.load(path, net=...), or from_pretrained(folder, net=...)."
        )
    _require_architecture(file, architecture, state)
    return Original(**architecture, mean=file.header["mean"], std=file.header["std"])


def _require_architecture(file: NernFile, architecture: Any, state: Mapping[str, Tensor]) -> None:
    """Compare the architecture's shapes with the file's before any memory is taken for them."""
    if not isinstance(architecture, dict) or not architecture.keys() <= _ARCHITECTURE:
        raise FileFormatError(f"{file.path} describes its network by unknown options.")
    name = architecture["name"]
    if not isinstance(name, str) or not timm.is_model(name):
        raise FileFormatError(
            f"{file.path} holds a network that this timm does not know: {str(name)[:100]}. If a module of "
            "yours registers it, import the module (on the command line: --import MODULE)."
        )
    with torch.device("meta"):
        net = timm_model(**architecture)
    if problems := mismatches(net.state_dict(), state):
        raise FileFormatError(f"{file.path} does not fit {name}: {'; '.join(problems)}.")
