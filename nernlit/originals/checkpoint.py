"""Reading a CNN's weights from the files that people have: safetensors, .pt/.pth/.th, Lightning .ckpt."""

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from nernlit.errors import CheckpointError

_NESTS = ("state_dict", "model", "model_state_dict")
_PREFIXES = ("module.", "model.", "_orig_mod.", "original.", "net.")


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """The network's tensors in a file, without the wrappers that trainers put around their names.

    Nothing is unpickled but tensors and plain containers (`weights_only=True`).

    Raises:
        CheckpointError: If the file is missing, cannot be read, or holds no tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no file at {path}; expected a CNN's weights (.safetensors, .pt, .pth, .th or .ckpt).")
    try:
        loaded: Any = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"cannot read weights from {path}: {reason} Only tensors are loaded, never code; "
            "save the network's state_dict() and pass that file."
        ) from error
    while isinstance(loaded, Mapping) and (nest := next((n for n in _NESTS if isinstance(loaded.get(n), Mapping)), "")):
        loaded = loaded[nest]
    state = {k: v for k, v in loaded.items() if isinstance(v, Tensor)} if isinstance(loaded, Mapping) else {}
    if not state:
        raise CheckpointError(
            f"{path} holds no named tensors; expected a state dict, bare or under {', '.join(_NESTS)}."
        )
    while prefix := next((p for p in _PREFIXES if all(key.startswith(p) for key in state)), ""):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def load_strictly(net: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Load a state dict that must fit exactly; only BatchNorm's step counters may be absent.

    Raises:
        CheckpointError: With the number and the first few of the missing, unexpected and wrongly shaped keys.
    """
    own = net.state_dict()
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in state if key not in own]
    shaped = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    problems = [
        f"{len(keys)} {kind} ({_some(keys)})"
        for kind, keys in (("missing", missing), ("unexpected", unexpected), ("wrongly shaped", shaped))
        if keys
    ]
    if problems:
        raise CheckpointError(
            f"{source} does not fit {type(net).__name__}: {'; '.join(problems)}. "
            "Check the original's name, num_classes and in_chans."
        )
    net.load_state_dict(dict(state), strict=False)


def _some(keys: Sequence[str], show: int = 3) -> str:
    return ", ".join(keys[:show]) + (", ..." if len(keys) > show else "")
