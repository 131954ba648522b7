"""The checkpoint that a command uses: found, and checked before anything is built from it."""

import glob
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_only

from nernlit.cli.runs import Run, version_of
from nernlit.errors import CheckpointError, UsageError
from nernlit.storage.checkpoint import newest_intact_checkpoint, read_checkpoint


def find_checkpoint(config: Any, command: str) -> Path | None:
    """The file that `--ckpt_path` names; None where it is not given, and for the first fit with `last` or `best`.

    A fit that resumes `last` or `best` logs into that run's folder, so that TensorBoard draws one curve.

    Args:
        config: The command's options. The loggers' version is changed in place for `last` and `best`.
        command: `fit`, `validate`, `test` or `predict`.

    Raises:
        CheckpointError: If there is no such file, or no whole one.
        UsageError: If `last` or `best` is given and the logger's options do not tell the run's folder.
    """
    given = config.get("ckpt_path")
    if given in ("last", "best"):
        loggers = logger_options(config)
        folder = _run_folder(loggers)
        version = loggers[0].get("version")
        own = f"version_{version}" if isinstance(version, int) else version
        versions = "version_*" if own is None else glob.escape(own)
        every = list(folder.glob(f"{versions}/checkpoints/{given}.ckpt"))
        if len(every) > 1 and any(version_of(path.parent.parent) < 0 for path in every):
            raise UsageError(
                f"--ckpt_path {given}: {folder} has several runs, whose names do not say which is the newest; pass the "
                "file, or --trainer.logger.version."
            )
        found = max(every, key=lambda path: version_of(path.parent.parent), default=None)
        if found is None:
            missing = f"--ckpt_path {given}: no {given}.ckpt in {folder}/{versions}/checkpoints"
            if command != "fit":
                raise CheckpointError(
                    f"{missing}; run `lightning fit` with the same configuration first, or pass the file."
                )
            say(f"nernlit: {missing} yet; starting a new fit")
            return None
        for logger in loggers:
            logger["version"] = found.parent.parent.name
        return _whole(found) if given == "last" else found
    if given is None:
        return None
    if given and Path(given).is_dir():
        return Run.open(given, "last" if command == "fit" else "best").checkpoint
    if not Path(given).is_file():
        raise CheckpointError(f"--ckpt_path {given}: no such file; pass a .ckpt, a run's folder, `last` or `best`.")
    return Path(given)


def logger_options(config: Any) -> list[Any]:
    """The options of each logger that the configuration names by its class; the first one has the run's folder."""
    given = config["trainer"].get("logger")
    loggers = given if isinstance(given, list) else [given]
    return [logger["init_args"] for logger in loggers if hasattr(logger, "get") and logger.get("init_args")]


def _run_folder(loggers: Sequence[Any]) -> Path:
    arguments = loggers[0] if loggers else {}
    if not arguments.get("name") or not arguments.get("save_dir"):
        raise UsageError(
            "--ckpt_path last|best needs a logger with save_dir and name (as in the shipped configurations); "
            "pass the checkpoint's file instead."
        )
    return Path(str(arguments["save_dir"]), str(arguments["name"])).expanduser()


def _whole(path: Path) -> Path:
    """The checkpoint itself, or the newest whole one beside it where it is damaged; reported on stderr.

    Raises:
        CheckpointError: If no checkpoint of the folder is whole.
    """
    try:
        read_checkpoint(path)
    except CheckpointError as error:
        found = newest_intact_checkpoint(path.parent)
        if found is None:
            raise CheckpointError(f"{error} All other checkpoints in {path.parent} are damaged too.") from error
        other, content = found
        say(f"nernlit: warning: {error}\nnernlit: continuing with {other} (step {content.get('global_step')}).")
        return other
    return path


def require_usable(path: Path, scheme: str, command: str) -> dict[str, Any]:
    """A checkpoint's content, unless the configured scheme cannot load it or a fit cannot be resumed from it.

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
            f"{path} has no optimizer state, so a fit cannot be resumed from it; pass a last.ckpt, or "
            f"start a new fit from it (--model.init_from {path})."
        )
    return content


def _name(class_path: Any) -> str:
    return str(class_path).rpartition(".")[2]


@rank_zero_only
def say(text: str) -> None:
    """Print a line on stderr, once for all processes."""
    print(text, file=sys.stderr)
