"""Parsing the options of the commands that do not use LightningCLI: `sweep`, `analyze`, `report`, `export`, ..."""

import argparse
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from nernlit.errors import UsageError


class CommandParser(argparse.ArgumentParser):
    """An `ArgumentParser` without abbreviations, whose errors are `UsageError`s.

    Args:
        command: Name of the command, such as `sweep`.
        description: What it does.
        epilog: What its help ends with.
    """

    def __init__(self, command: str, description: str | None, epilog: str | None = None) -> None:
        super().__init__(prog=f"nernlit {command}", description=description, epilog=epilog, allow_abbrev=False)

    def add_original(self) -> None:
        """Add `--original FILE`, for commands that compare with the original."""
        self.add_argument(
            "--original",
            type=path,
            help="file of the original's weights: if it has moved since the fit, or for a .nern file",
        )

    def add_network(self) -> None:
        """Add `NET` and `--network NAME`, for commands that start from a trained network."""
        self.add_argument(
            "net",
            metavar="NET",
            help="file of the network's weights, the run that trained it, or a timm model with pretrained weights",
        )
        self.add_argument("--network", help="timm name of the network, for a file of weights that does not say it")

    def parse_with_fit_options(self, args: Sequence[str]) -> tuple[argparse.Namespace, list[str], list[str]]:
        """The command's own options, those of the data, and those of its fits, of which some may be unknown."""
        others, data = split_options(args, "--data")
        others, of_fits = split_options(others, *_FIT_OPTIONS)  # their values would be taken for NET
        own, further = self.parse_known_args(others)
        return own, data, [*of_fits, *further]

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; `{self.prog} --help` lists the options.")


#: Options of `fit` that take a value; those that other commands pass on to it.
_FIT_OPTIONS = (
    *("--model", "--trainer", "--best_checkpoint", "--last_checkpoint", "--figures", "--seed_everything", "--threads"),
    *("-c", "--config", "--schedule"),
)


def split_options(args: Sequence[str], *names: str) -> tuple[list[str], list[str]]:
    """Split off options and those below them, such as `--data` and `--data.root`, wherever they stand.

    Returns:
        All other arguments, and these, each with its value: `--data.root=DIR`.
    """
    others: list[str] = []
    taken: list[str] = []
    rest = iter(args)
    for arg in rest:
        flag, equals, _ = arg.partition("=")
        if not any(flag == name or flag.startswith(f"{name}.") for name in names):
            others.append(arg)
        elif equals:
            taken.append(arg)
        elif (value := next(rest, None)) is not None:
            taken.append(f"{flag}={value}")
        else:
            raise UsageError(f"{flag} needs a value.")
    return others, taken


def without_init_args(option: str) -> str:
    """An option in its short form, which means the same."""
    return option.replace(".init_args", "")


def refuse_own_options(own: Mapping[str, str], args: Sequence[str]) -> None:
    """Refuse options of `fit` that a command sets itself.

    Args:
        own: Name of an option in its short form -> what to do instead.
        args: The user's options: `--name=value`, or `--name` and the value.

    Raises:
        UsageError: With the option.
    """
    for arg in args:
        if (name := without_init_args(arg.partition("=")[0])) in own:
            raise UsageError(f"{arg}: this command sets {name}; {own[name]}.")


def path(text: str) -> Path:
    """An argparse type: a path; `~` is the home folder."""
    return Path(text).expanduser()


def count(text: str) -> int:
    """An argparse type: an integer of at least 1."""
    return _at_least(text, 1)


def seed(text: str) -> int:
    """An integer of at least 0."""
    return _at_least(text, 0)


def finite(text: str) -> float:
    """A number that is neither infinite nor NaN."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text}; expected a finite number")
    return value


def positive(text: str) -> float:
    """A finite number above 0."""
    value = finite(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text}; expected a number above 0")
    return value


def require_writable(folder: Path, option: str) -> None:
    """Check before long work that files can be written into a folder, which need not exist yet.

    Raises:
        UsageError: If they cannot.
    """
    existing = next((path for path in (folder, *folder.absolute().parents) if os.path.lexists(path)), Path())
    if not existing.is_dir():
        raise UsageError(f"{option} {folder}: {existing.name} is a file; expected a folder.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UsageError(f"{option} {folder}: no permission to write into {existing}; pass another folder.")


def _at_least(text: str, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise argparse.ArgumentTypeError(f"{text}; expected an integer of at least {least}")
    return value
