"""Configuration files: checked reading, the files that `base:` names, and the variants that `schedule` selects."""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ActionConfigFile  # type: ignore[attr-defined]  # public, but not in __all__

from nernlit.errors import UsageError

SCHEDULES = ("fast", "paper")
#: Keys of a file that say which other files belong to it; they are no options of a command.
_OWN_KEYS = ("base", "schedule")
#: The class that `data: null` stands for. It keeps the length of an epoch that other files gave.
NO_DATA = "NoImages"
#: YAML nodes with all aliases expanded; a small file of nested aliases can stand for billions.
_MOST_NODES = 100_000


class ConfigFile(ActionConfigFile):
    """`-c FILE`: the options of a configuration file, without those of its bases (see `expand_bases`)."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        root = _read(Path(values))
        root.value = [(key, value) for key, value in root.value if key.value not in _OWN_KEYS]
        for key, value in root.value:
            if key.value == "data" and value.tag == "tag:yaml.org,2002:null":
                value.tag, value.value = "tag:yaml.org,2002:str", NO_DATA
        try:
            self.apply_config(parser, cfg, self.dest, yaml.serialize(root))
        except (TypeError, ValueError, yaml.YAMLError) as error:
            reason = " ".join(str(error).removeprefix('Parser key "config":').split())
            raise UsageError(f"{values}: {reason}") from error


def expand_bases(args: Sequence[str]) -> list[str]:
    """Put the files that a configuration names under `base:` before it, so that it only says what differs.

    Paths under `base:` are relative to the file that names them. Every base is read once, at its first place. Later
    files win, and options on the command line win over all files; lists are replaced, not joined. With `--schedule
    NAME`, or `schedule: NAME` in a file, these files are followed by the X.NAME.yaml beside each X.yaml among them.

    Raises:
        UsageError: If a file is missing or no valid configuration, builds on itself, or no file has a variant of the
            schedule's name.
    """
    given, schedule, rest = _split(args)
    groups: list[list[Path]] = []
    for path in given:
        before = {file.resolve() for group in groups for file in group}
        groups.append([*(file for file in _bases(path, ()) if file.resolve() not in before), path])
    named = [(name, path) for group in groups for path in group if (name := _named(path, "schedule")) is not None]
    chosen, origin = ("fast", "") if not named else (str(named[-1][0]), f"{named[-1][1]}: schedule: {named[-1][0]}")
    if schedule is not None:
        chosen, origin = schedule, f"--schedule {schedule}"
    if chosen not in SCHEDULES:
        raise UsageError(f"{origin}: expected one of {', '.join(SCHEDULES)}.")
    files, variants = [], 0
    for group in groups:
        own_variants = [variant for file in group if (variant := file.with_suffix(f".{chosen}.yaml")).is_file()]
        variants += len(own_variants)
        files += [*group, *own_variants]
    if chosen != "fast" and not variants:
        raise UsageError(f"{origin}: none of the given configurations has one (X.{chosen}.yaml beside X.yaml).")
    options = [arg for file in files for arg in ("-c", str(file))]
    command = 1 if rest and not rest[0].startswith("-") else 0
    return [*rest[:command], *options, *rest[command:]]


def _split(args: Sequence[str]) -> tuple[list[Path], str | None, list[str]]:
    """The configuration files, the schedule and all other arguments of a command line."""
    files: list[Path] = []
    others: list[str] = []
    schedule = None
    rest = iter(args)
    for arg in rest:
        flag, equals, value = arg.partition("=")
        if flag.startswith("-c") and not flag.startswith("--") and flag != "-c":
            flag, equals, value = "-c", "=", arg[2:]
        if flag == "--data":
            value = value if equals else next(rest, "")
            others.append(f"--data={NO_DATA if value == 'null' else value}")
            continue
        if flag not in ("-c", "--config", "--schedule"):
            others.append(arg)
            _refuse_inline_duplicates(value if equals else arg)
            continue
        if not equals and not (value := next(rest, "")):
            raise UsageError(f"{flag} needs a value: {'a schedule' if flag == '--schedule' else 'a YAML file'}.")
        if flag == "--schedule":
            schedule = value
        else:
            files.append(Path(value))
    return files, schedule, others


def _bases(path: Path, above: tuple[Path, ...]) -> list[Path]:
    """All files that a configuration builds on, each once, the deepest first."""
    if path in above:
        raise UsageError(f"{path} builds on itself: {' -> '.join(map(str, (*above, path)))}.")
    names = _named(path, "base") or []
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UsageError(f"{path}: base: {names}; expected a list of YAML files, relative to this one.")
    found: dict[Path, Path] = {}
    for name in names:
        base = path.parent / name
        for file in [*_bases(base, (*above, path)), base]:
            found.setdefault(file.resolve(), file)
    return list(found.values())


def read_config(path: Path) -> dict[str, Any]:
    """The values of a configuration file, such as the `config.yaml` of a run.

    Raises:
        UsageError: If it is missing or no valid configuration.
    """
    root = _read(path)
    try:
        content: dict[str, Any] = yaml.safe_load(yaml.serialize(root))
    except (ValueError, yaml.YAMLError) as error:  # a tag that makes an object, or a date that does not exist
        raise UsageError(f"{path} is no configuration: {' '.join(str(error).split())}") from error
    return content


def _named(path: Path, key: str) -> Any:
    """The value of a key at the top level of a file."""
    nodes = {name.value: value for name, value in _read(path).value}
    return yaml.safe_load(yaml.serialize(nodes[key])) if key in nodes else None


def _read(path: Path) -> yaml.MappingNode:
    """The root of a configuration file, without making objects of its values.

    Raises:
        UsageError: If it is missing, unreadable, no YAML mapping, or says a key twice.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise UsageError(
            f"no configuration file {path}; the shipped ones are in the repository's configs/ folder."
        ) from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not a text file in UTF-8; expected a YAML configuration.") from error
    except (OSError, ValueError) as error:
        raise UsageError(
            f"cannot read the configuration {path}: {getattr(error, 'strerror', None) or error}."
        ) from error
    try:
        root = yaml.compose(text, yaml.SafeLoader)
    except (yaml.YAMLError, RecursionError) as error:
        raise UsageError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if root is None:
        raise UsageError(f"{path} is empty; expected options such as `trainer: {{max_epochs: 8}}`.")
    if not isinstance(root, yaml.MappingNode):
        raise UsageError(f"{path} holds no options; expected a YAML mapping such as `trainer: {{max_epochs: 8}}`.")
    _refuse_duplicates(path, root)
    return root


def _refuse_inline_duplicates(value: str) -> None:
    if value[:1] in ("{", "["):
        with contextlib.suppress(yaml.YAMLError):  # the option's type says what is wrong
            if (root := yaml.compose(value, yaml.SafeLoader)) is not None:
                _refuse_duplicates(value, root)


def _refuse_duplicates(source: Path | str, root: yaml.Node) -> None:
    waiting: list[yaml.Node] = [root]
    visited = 0
    while waiting:
        node = waiting.pop()
        visited += 1
        if visited > _MOST_NODES:
            raise UsageError(f"{source} has more than {_MOST_NODES:,} values; it is no configuration.")
        if isinstance(node, yaml.SequenceNode):
            waiting += node.value
        elif isinstance(node, yaml.MappingNode):
            lines: dict[str, int] = {}
            for key, value in node.value:
                waiting.append(value)
                line = key.start_mark.line + 1
                if not isinstance(key, yaml.ScalarNode):
                    raise UsageError(f"{source}, line {line}: a list or a mapping as a name; expected `name: value`.")
                if key.value in lines:
                    raise UsageError(
                        f"{source}, line {line}: {key.value!r} is given again (first in line {lines[key.value]}); "
                        "keep one of them."
                    )
                lines[key.value] = line
