"""Reading a CNN's weights from common files: safetensors, .pt/.pth/.th, Lightning .ckpt."""

import argparse
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from nernlit.errors import CheckpointError
from nernlit.storage.file_kinds import describe_file, zip_damage
from nernlit.storage.matching import mismatches, network_weights
from nernlit.utilities.text import abbreviated

#: Functions that unpickle NumPy scalars and arrays; NumPy 1 and 2 store them under different module names.
_NUMPY_CONSTRUCTORS: list[Any] = [np.float64(0).__reduce__()[0], np.empty(0).__reduce__()[0]]
#: Classes that hold values and no code, beside those that torch allows.
_VALUES: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    *((make, f"numpy.{core}.multiarray.{make.__name__}") for make in _NUMPY_CONSTRUCTORS for core in ("core", "_core")),
    np.ndarray,
    np.dtype,
    *{type(np.dtype(code)) for code in np.typecodes["AllInteger"] + np.typecodes["Float"] + "?SU"},
    argparse.Namespace,  # the options of a training script, as timm writes them
]


def read_state_dict(path: str | Path, net: nn.Module | None = None, ema: bool | None = None) -> dict[str, Tensor]:
    """The network's tensors in a file, without the wrappers that trainers put around their names.

    The file's content decides how it is read, not its name. Nothing is unpickled but tensors, numbers and plain
    containers (`weights_only=True`).

    Args:
        path: A file of safetensors or of `torch.save`.
        net: The network, with which the file's sets of tensors are compared. If none fits, the closest is returned, and
            `load_strictly` reports the differences.
        ema: If there are two sets of weights, return the moving average (True) or the raw weights (False). By default
            the moving average if there is one, as in `timm.create_model(checkpoint_path=...)`.

    Raises:
        CheckpointError: If the file is missing, cannot be read, has no named tensors, or several sets fit equally well.
    """
    content = _content(Path(path))
    return network_weights(content, str(path), None if net is None else net.state_dict(), ema)


def _content(path: Path) -> Any:
    if not os.path.exists(path):  # unlike Path.exists, False for names that the system does not take
        raise CheckpointError(f"no file at {path}; expected a CNN's weights (.safetensors, .pt, .pth, .th or .ckpt).")
    try:
        with path.open("rb") as file:
            head = file.read(9)
            if head[8:] == b"{":
                return load_file(path)
            if head.startswith(b"PK") and (damage := zip_damage(path)):
                raise ValueError(damage)
            file.seek(0)
            # Pass an open file, not its path: torch would choose the format by the suffix `.safetensors`.
            with torch.serialization.safe_globals(_VALUES), warnings.catch_warnings(action="ignore"):
                return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises nearly anything for files that are not its own
        raise CheckpointError(
            f"cannot read weights from {path}: it is {describe_file(path)}. Only tensors are loaded, never code; "
            "save the network's state_dict() with torch.save or as safetensors, and pass that file."
        ) from error


def load_strictly(net: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Load a state dict that must fit exactly; only BatchNorm's step counters may be absent.

    Raises:
        CheckpointError: With the number and the first few of the missing, unexpected and wrongly shaped keys, or of
            tensors that hold no floating-point numbers.
    """
    own = net.state_dict()
    problems = mismatches(own, state)
    if problems and any(key.startswith("representation.") for key in state):
        raise CheckpointError(
            f"{source} is a checkpoint of a predictor, not of a network. Export it (`nernlit export`) and pass the "
            ".nern file, or pass the original's weights."
        )
    if problems:
        raise CheckpointError(
            f"{source} does not fit {type(net).__name__}: {'; '.join(problems)}. "
            "Check the original's name, num_classes and in_chans."
        )
    require_floats(own, state, source)
    net.load_state_dict(state, strict=False)


def require_floats(own: Mapping[str, Any], state: Mapping[str, Any], source: str) -> None:
    """Refuse tensors that hold no floating-point numbers where a network's own do.

    Raises:
        CheckpointError: With the first few of them.
    """
    unusable = [
        f"{key} is {_kind(state[key])}"
        for key, value in own.items()
        if isinstance(value, Tensor) and value.is_floating_point() and isinstance(state.get(key), Tensor)
        if not _holds_floats(state[key])
    ]
    if unusable:
        raise CheckpointError(
            f"{source} holds tensors that are no floating-point weights: {abbreviated(unusable, 3)}. "
            "Convert them to float32 (dequantize them, or .to_dense()) before you save them."
        )


def _holds_floats(value: Tensor) -> bool:
    return value.is_floating_point() and value.layout == torch.strided and not (value.is_quantized or value.is_meta)


def _kind(value: Tensor) -> str:
    layout = "" if value.layout == torch.strided else f" ({str(value.layout).removeprefix('torch.')})"
    return f"{str(value.dtype).removeprefix('torch.')}{layout}{' without values (meta)' if value.is_meta else ''}"
