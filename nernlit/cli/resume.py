"""Which checkpoint a command goes on with: checked before anything is built from it."""

import sys
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_only

from nernlit.errors import CheckpointError, UsageError
from nernlit.storage.checkpoint import newest_whole_checkpoint, read_checkpoint


def whole_last_checkpoint(path: Path) -> Path:
    """`last.ckpt` itself, or the newest whole checkpoint beside it where it is damaged; says so on stderr.

    Raises:
        CheckpointError: If no checkpoint of the folder is whole.
    """
    try:
        read_checkpoint(path)
    except CheckpointError as error:
        found = newest_whole_checkpoint(path.parent)
        if found is None:
            raise CheckpointError(f"{error} No other checkpoint in {path.parent} is whole.") from error
        other, content = found
        say(f"nernlit: warning: {error}\nnernlit: going on with {other}, of step {content.get('global_step')}.")
        return other
    return path


def require_usable(path: Path, scheme: str, command: str) -> dict[str, Any]:
    """A checkpoint's content, unless the configured scheme cannot load it or a fit cannot go on from it.

    Args:
        path: The checkpoint.
        scheme: Class path of the configuration's module.
        command: `fit`, `validate`, `test` or `predict`.

    Raises:
        CheckpointError: If it is not a whole checkpoint, or holds no optimizer state and `command` is `fit`.
        UsageError: If it belongs to another scheme.
    """
    content = read_checkpoint(path)
    fitted = content.get("hyper_parameters", {}).get("_class_path", scheme)
    if _name(fitted) != _name(scheme):
        raise UsageError(
            f"{path} is a checkpoint of {_name(fitted)}, and the configuration describes {_name(scheme)}; pass the "
            f"configuration that it was fitted with, or start a new fit from it (--model.init_from {path})."
        )
    if command == "fit" and not {"optimizer_states", "loops"} <= content.keys():
        raise CheckpointError(
            f"{path} holds weights and no optimizer state, so that a fit cannot go on from it; pass a last.ckpt, or "
            f"start a new fit from it (--model.init_from {path})."
        )
    return content


def _name(class_path: Any) -> str:
    return str(class_path).rpartition(".")[2]


@rank_zero_only
def say(text: str) -> None:
    """Print a line on stderr, once for all processes."""
    print(text, file=sys.stderr)
