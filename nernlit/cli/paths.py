"""Paths in a configuration: runs are replaced by their checkpoints, and all paths become absolute."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nernlit.cli.configs import shipped_configs
from nernlit.cli.resume import say
from nernlit.cli.runs import Run
from nernlit.errors import CheckpointError

#: Options that take a checkpoint's file, or the folder of a run (its newest best checkpoint).
_WEIGHTS = ("checkpoint", "init_from")
_FOLDERS = ("root",)


def resolve_paths(tree: Any, option: str, configs: Sequence[Path]) -> None:
    """Make the paths in a part of the configuration absolute, in place, so that its run can be used from any folder.

    Args:
        tree: Nested options, as the parser gives them.
        option: The name of the part.
        configs: The configuration files that were given; one beside them may be the one that trains a missing original.

    Raises:
        CheckpointError: If a run's folder is named that does not exist or holds no checkpoint.
    """
    if isinstance(tree, list):
        for number, item in enumerate(tree):
            resolve_paths(item, f"{option}.{number}", configs)
    if not hasattr(tree, "items"):
        return
    entries = vars(tree) if not isinstance(tree, dict) else tree
    for key, value in entries.items():
        name = option if key in ("init_args", "dict_kwargs") else f"{option}.{key}"
        if not isinstance(value, str) or "://" in value:
            resolve_paths(value, name, configs)
        elif key in _FOLDERS:
            entries[key] = str(Path(value).expanduser().absolute())
        elif key in _WEIGHTS:
            entries[key] = str(_weights(Path(value).expanduser(), name, configs).absolute())


def _weights(path: Path, option: str, configs: Sequence[Path]) -> Path:
    if path.is_file() or (path.suffix and not path.exists()):
        return path  # its reader reports what is wrong
    if not path.exists():
        raise CheckpointError(
            f"--{option} {path}: no such file or run; {_training(path.name, configs)}pass the file of a checkpoint."
        )
    found = Run.open(path).checkpoint
    say(f"nernlit: --{option} {path}: taking {found}")
    return found


def _training(name: str, configs: Sequence[Path]) -> str:
    """How to fit the run of this name, where a file beside the given configurations or a shipped one does so."""
    folders = [folder for config in configs for folder in (config.parent, config.parent.parent)]
    found = next((file for folder in folders if (file := folder / f"{name}.yaml").is_file()), None)
    shipped = shipped_configs().get(name)
    if shipped is not None and (found is None or found.samefile(shipped)):
        return f"fit it once with `lightning fit -c {name}`, or "
    return f"fit it once with `lightning fit -c {found}`, or " if found is not None else ""
