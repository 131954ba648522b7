"""The command line: dispatch of commands, and the format of errors."""

import errno
import io
import logging
import os
import re
import sys
import threading
import warnings
from argparse import ArgumentError
from collections.abc import Sequence
from contextlib import nullcontext
from contextvars import ContextVar
from importlib import import_module
from pathlib import Path

from jsonargparse import ArgumentError as ParserError
from lightning.fabric.utilities.exceptions import MisconfigurationException

from nernlit.cli.arguments import split_options
from nernlit.cli.parser_errors import closest, explain
from nernlit.cli.trainer import ROOTS, TRAINER_COMMANDS, NernlitCLI, run
from nernlit.coding import is_nern
from nernlit.errors import NernlitError, UsageError
from nernlit.utilities.cpu import free_cores_only
from nernlit.utilities.trust import is_installed, is_refused, known_names_only, refusal, trusting

__all__ = ["NernlitCLI", "main", "run", "user_message"]

#: What messages on stderr begin with.
ERROR = "nernlit: error: "
#: The options of the running command that all commands have: `--debug`, `--trust` and `--import`, where given.
GLOBAL_OPTIONS: ContextVar[tuple[str, ...]] = ContextVar("GLOBAL_OPTIONS", default=())

#: Commands without a trainer -> their module in `nernlit.cli` and its function.
_OTHER_COMMANDS = {
    "compare": ("compare", "compare"),
    "compress": ("compress", "compress"),
    "configs": ("shipped", "main"),
    "doctor": ("doctor", "main"),
    "export": ("export", "export"),
    "inspect": ("export", "inspect"),
    "reconstruct": ("export", "reconstruct"),
    "search": ("search", "main"),
    "sweep": ("sweep", "main"),
    "analyze": ("analyze", "main"),
    "report": ("report", "main"),
}
_COMMANDS = (*TRAINER_COMMANDS, *_OTHER_COMMANDS)

#: Messages that libraries print at every run and on which a user cannot act.
_FILTERED = (
    "The dirpath has changed",  # test and predict save no checkpoints
    "`isinstance(treespec, LeafSpec)` is deprecated",
    'Please add the following callbacks: ["BestCheckpoint',  # predict: without data it would follow another metric
    "Couldn't infer the batch indices",  # predict: the batch is empty on purpose
    "module(s) in eval mode at the start of training",  # the frozen original
    "does not have many workers",  # whole batches come from memory
    "is smaller than the logging interval",
    "/checkpoints exists and is not empty",  # of a resumed fit
    "GPU available: False, used: False",
    "TPU available: False",
    "HPU available: False",
    "LOCAL_RANK: 0 - CUDA_VISIBLE_DEVICES",
    "to estimate number of stepping batches",
    "`Trainer.fit` stopped: `max_",  # the planned end
    "but have no logger configured",  # `test FILE.nern` writes no curves
    "try installing [lit",  # advertisements
    "`weights_only` was not set",  # our checkpoint reader never unpickles code
    "your dataloader is not resumable",  # ours resumes at the next batch
)


def _filter_library_messages() -> None:
    for message in _FILTERED:
        warnings.filterwarnings("ignore", message=f".*{re.escape(message)}")
    # A filter of a logger does not see what its children log.
    for part in ("utilities.rank_zero", "trainer.connectors.checkpoint_connector"):
        logging.getLogger(f"lightning.pytorch.{part}").addFilter(
            lambda record: not any(message in record.getMessage() for message in _FILTERED)
        )


def main(args: Sequence[str] | None = None) -> None:
    """Entry of `lightning`, `nernlit` and `python -m nernlit`.

    A user-fixable error is one message and exit code 2; `--debug` or NERNLIT_DEBUG=1 shows the traceback. Without
    `--trust`, only known packages and modules of the working directory can be named. `--import MODULE` imports such a
    module before the command.
    """
    given = list(sys.argv[1:] if args is None else args)
    flags = tuple(option for option in ("--debug", "--trust") if option in given)
    debug = "--debug" in flags or os.environ.get("NERNLIT_DEBUG", "") not in ("", "0")
    given = [arg for arg in given if arg not in flags]
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal that is not UTF-8 still shows the rest
    _filter_library_messages()
    _import_from_working_directory()
    token = GLOBAL_OPTIONS.set(flags)
    with trusting() if "--trust" in flags else nullcontext(), known_names_only():
        try:
            given, imports = split_options(given, "--import")
            GLOBAL_OPTIONS.set((*flags, *imports))
            for option in imports:
                _import(option.removeprefix("--import="))
            _run_command(given)
        except Exception as error:
            message = None if debug else user_message(error)
            if message is None:
                raise
            print(f"{ERROR}{message}", file=sys.stderr)
            raise SystemExit(2) from error
        finally:
            GLOBAL_OPTIONS.reset(token)


def _import(module: str) -> None:
    """Import a module that `--import` names.

    Raises:
        UsageError: If there is none, or it may not be imported.
    """
    if not module.replace(".", "").isidentifier() or is_refused(module) or not is_installed(module):
        raise UsageError(f"--import {module}: {refusal(module)}")
    import_module(module)


def _run_command(given: Sequence[str]) -> None:
    command = given[0] if given else ""
    if command not in _COMMANDS:
        raise UsageError(_unknown_command(command))
    is_nern_file = command == "test" and _names_nern_file(given[1:])
    if command in TRAINER_COMMANDS and not is_nern_file:
        run(given)
    else:
        module, function = ("export", "test") if is_nern_file else _OTHER_COMMANDS[command]
        # Each fit of a search or a sweep sets its own threads.
        with nullcontext() if command in ("search", "sweep") else free_cores_only():
            getattr(import_module(f"nernlit.cli.{module}"), function)(given[1:])


def _names_nern_file(args: Sequence[str]) -> bool:
    """Whether one of the arguments is a .nern file that is not an option's value."""
    flags = [arg.startswith("-") and "=" not in arg for arg in ("", *args)]
    return any(not flag and not arg.startswith("-") and is_nern(arg) for arg, flag in zip(args, flags, strict=False))


#: Error numbers of a full or failing disk.
_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EFBIG}


def report_failed_thread(failure: threading.ExceptHookArgs) -> None:
    """A `threading.excepthook` without tracebacks of user-fixable errors, such as TensorBoard's on a full disk.

    The main thread gets the same error at its next write.
    """
    if failure.exc_value is None or user_message(failure.exc_value) is None:
        threading.__excepthook__(failure)


def _unknown_command(command: str) -> str:
    close = closest(command, _COMMANDS)
    hint = f" (did you mean {close[0]}?)" if close else ""
    return f"unknown command {command!r}{hint}; the first argument is one of {', '.join(_COMMANDS)}."


def _import_from_working_directory() -> None:
    """Let YAML name modules of the working directory: scripts, unlike `python -m`, do not have it in `sys.path`."""
    if not {"", str(Path.cwd())} & set(sys.path):
        sys.path.insert(0, str(Path.cwd()))


def user_message(error: BaseException) -> str | None:
    """The message of an error that the user can fix; None for others, which are bugs and keep their traceback."""
    cause: BaseException | None = error
    while cause is not None:  # the parser wraps what a constructor raised
        if isinstance(cause, NernlitError | MisconfigurationException):
            return str(cause)
        cause = cause.__cause__
    if isinstance(error, ParserError | ArgumentError) or "Does not validate against" in str(error):
        return explain(str(error), ROOTS)
    if isinstance(error, RuntimeError) and "Early stopping conditioned on metric" in str(error):
        return str(error)
    if isinstance(error, ModuleNotFoundError) and error.name == "optuna":
        return "`nernlit search` needs the Python package optuna; install it: pip install 'nernlit[optuna]'."
    if isinstance(error, ValueError) and "embedded null byte" in str(error):
        return "the name of a file or of a run holds a NUL character; leave it out."
    if isinstance(error, UnicodeEncodeError) and error.encoding == sys.getfilesystemencoding():
        name = error.object
        return f"the file name {name!r} cannot be encoded in this locale; set PYTHONUTF8=1 or LC_ALL=C.UTF-8."
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}."
    if isinstance(error, OSError) and error.errno in _DISK_ERRORS:  # without a file name, such as TensorBoard's
        why = error.strerror
        return f"a file of the run cannot be written: {why}; free some space and continue with --ckpt_path last."
    return None
