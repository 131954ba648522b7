"""Configurations that build on others: `base:` in a YAML file, and the variants that `--schedule` selects."""

from collections.abc import Sequence
from pathlib import Path

import yaml

from nernlit.errors import UsageError


def expand_bases(args: Sequence[str]) -> list[str]:
    """Put the files that a configuration names under `base:` before it, so that it only says what differs.

    Paths under `base:` are relative to the file that names them. Later files win; lists are replaced, not joined. With
    `--schedule NAME` these files are followed by the X.NAME.yaml that stands beside an X.yaml among them.

    Raises:
        UsageError: If a file is missing, builds on itself, or no file has a variant of the schedule's name.
    """
    schedule = _value(args, "--schedule") or "fast"
    expanded: list[str] = []
    variants = 0
    rest = iter(args)
    for arg in rest:
        flag, _, inline = arg.partition("=")
        if flag not in ("-c", "--config"):
            expanded.append(arg)
            continue
        path = Path(inline or next(rest, ""))
        files = [*_bases(path, ()), path]
        own_variants = [variant for file in files if (variant := file.with_suffix(f".{schedule}.yaml")).is_file()]
        variants += len(own_variants)
        for file in [*files, *own_variants]:
            expanded += ["-c", str(file)]
    if schedule != "fast" and not variants:
        raise UsageError(f"--schedule {schedule}: none of the given configurations has one.")
    return expanded


def _value(args: Sequence[str], flag: str) -> str | None:
    """What `flag VALUE` or `flag=VALUE` gives."""
    for arg, following in zip(args, [*args[1:], ""], strict=True):
        if arg == flag:
            return following
        if arg.startswith(f"{flag}="):
            return arg.partition("=")[2]
    return None


def _bases(path: Path, above: tuple[Path, ...]) -> list[Path]:
    """All files that a configuration builds on, the deepest first."""
    if path in above:
        raise UsageError(f"{path} builds on itself: {' -> '.join(map(str, above))}.")
    if not path.is_file():
        raise UsageError(f"no configuration file {path}; the shipped ones are in the repository's configs/.")
    try:
        content = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise UsageError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    named = content.get("base") or [] if isinstance(content, dict) else []
    below = [path.parent / name for name in named]
    return [found for base in below for found in [*_bases(base, (*above, path)), base]]
