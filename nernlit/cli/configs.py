"""Configuration files: the names of the shipped ones, the files that `base:` names, sections for schedules and pairs.

A file is plain YAML: options, and four keys that are no options:

    base: [base/decoupled.yaml, base/cifar100.yaml]  # read before this file, which only says what differs
    schedule: paper                                  # as `--schedule paper`
    paper: {trainer: {max_epochs: 450}}              # options under that schedule; they follow all others
    with:                                            # options that hold together with another file
      baseline.yaml:
        trainer: {max_epochs: 40}
        paper: {model: {init_args: {warmup_steps: 10000}}}
"""

import hashlib
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ActionConfigFile  # type: ignore[attr-defined]  # public, but not in __all__

import nernlit
from nernlit.cli.config_parts import SCHEDULES, WITH, Part, class_of, items
from nernlit.cli.parser_errors import closest
from nernlit.cli.yaml_files import EXAMPLE, node_value, read_node, refuse_inline_duplicates
from nernlit.errors import UsageError

#: The class that `data: null` stands for. It keeps the length of an epoch that other files gave.
NO_DATA = "NoImages"

_PACKAGE = Path(nernlit.__file__).parent
#: The shipped configurations: inside an installed package, beside it in a clone.
FOLDER = _PACKAGE / "configs" if (_PACKAGE / "configs").is_dir() else _PACKAGE.parent / "configs"


def shipped_configs() -> dict[str, Path]:
    """Name -> file of every configuration that can be fitted."""
    return {path.stem: path for path in sorted(FOLDER.glob("*.yaml"))}


def base_files() -> dict[str, Path]:
    """Name -> file of everything that the shipped configurations build on."""
    return {path.stem: path for path in sorted(FOLDER.glob("base/*.yaml"))}


def find_config(name: str, folder: Path = Path()) -> Path:
    """The file of a path relative to `folder`, or of the name of a shipped configuration or base file.

    A file that exists comes first.

    Raises:
        UsageError: If there is no such file.
    """
    path = folder / name
    if path.is_file():
        return path
    shipped = shipped_configs() | base_files()
    if name in shipped:
        return shipped[name]
    if path.exists():
        return path  # reading it says what is wrong
    own = path.with_name(f"{path.name}.yaml")
    close = [own.name] if own.is_file() else closest(Path(name).stem, shipped)
    hint = f" (did you mean {' or '.join(close)}?)" if close else ""
    raise UsageError(f"no configuration file {path}{hint}; `nernlit configs` lists the shipped ones.")


class ConfigFile(ActionConfigFile):
    """`-c FILE`: the options of a part of a configuration file (see `expand_bases`)."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        root = Part.parse(str(values)).node()
        if any(key.value == "trainer" and not isinstance(value, yaml.MappingNode) for key, value in root.value):
            raise UsageError(f"{values}: trainer: expected options such as {EXAMPLE}.")
        no_data = yaml.ScalarNode("tag:yaml.org,2002:str", NO_DATA)
        root.value = [
            (key, no_data if key.value == "data" and value.tag == "tag:yaml.org,2002:null" else value)
            for key, value in root.value
        ]
        try:
            self.apply_config(parser, cfg, self.dest, yaml.serialize(root))
        except (TypeError, ValueError, yaml.YAMLError) as error:
            reason = " ".join(str(error).removeprefix('Parser key "config":').split())
            raise UsageError(f"{values}: {reason}") from error


def expand_bases(args: Sequence[str]) -> list[str]:
    """Put the files that a configuration names under `base:` before it, so that it only says what differs.

    Names under `base:` are paths relative to the file that names them, or those of shipped files. Every base is read
    once, at its first place. Later files win, and options on the command line win over all files; lists are replaced,
    not joined. A section `with: {NAME: ...}` follows the later of both files where both are read. With `--schedule
    NAME`, or `schedule: NAME` in a file, a file and its bases are followed by their sections of that name.

    Raises:
        UsageError: If a file is missing or invalid, a file is its own base, no file has a section for the schedule, or
            two files have different schemes.
    """
    given, schedule, rest = _split(args)
    groups: list[list[Path]] = []
    for path in given:
        before = {file.resolve() for group in groups for file in group}
        groups.append([*(file for file in _bases(path, ()) if file.resolve() not in before), path])
    _require_one_scheme(dict(zip(given, groups, strict=True)))
    named = [(name, path) for group in groups for path in group if (name := _named(path, "schedule")) is not None]
    chosen, origin = ("fast", "") if not named else (str(named[-1][0]), f"{named[-1][1]}: schedule: {named[-1][0]}")
    if schedule is not None:
        chosen, origin = schedule, f"--schedule {schedule}"
    if chosen not in SCHEDULES:
        raise UsageError(f"{origin}: expected one of {', '.join(SCHEDULES)}.")
    parts: list[Part] = []
    scheduled: list[Part] = []
    pairs: list[tuple[Part, set[Path]]] = []
    seen: set[Path] = set()
    for group in groups:
        own: list[Part] = []
        for file in group:
            for section in (part for name in SCHEDULES for part in Part(file).schedule_sections(name)):
                section.node()  # refuses one that is no mapping, also where it is not used
            seen.add(file.resolve())
            pairs += _pairs(file)
            own += [Part(file), *(part for part, pair in pairs if file.resolve() in pair and pair <= seen)]
        own_scheduled = [
            section.for_classes(part, own[number:])
            for number, part in enumerate(own, 1)
            for section in part.schedule_sections(chosen)
        ]
        scheduled += own_scheduled
        parts += [*own, *own_scheduled]
    if chosen != "fast" and not scheduled:
        raise UsageError(f"{origin}: none of the given configurations has a section `{chosen}:`.")
    for part in parts:
        part.node()  # refuses a section that is no mapping
    options = [arg for part in parts for arg in ("-c", str(part))]
    command = 1 if rest and not rest[0].startswith("-") else 0
    return [*rest[:command], *options, *rest[command:]]


def config_fingerprint(args: Sequence[str]) -> str:
    """A hash of the contents of all configuration files that arguments name, in their order."""
    content = hashlib.sha256()
    for part in config_parts(expand_bases(args)):
        content.update(part.file.read_bytes())
    return content.hexdigest()[:12]


def config_parts(args: Sequence[str]) -> list[Part]:
    """The parts of configuration files in arguments that `expand_bases` returned."""
    return [Part.parse(value) for flag, value in pairwise(args) if flag == "-c"]


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
            refuse_inline_duplicates(value if equals else arg)
            continue
        if not equals and not (value := next(rest, "")):
            raise UsageError(f"{flag} needs a value: {'a schedule' if flag == '--schedule' else 'a YAML file'}.")
        if flag == "--schedule":
            schedule = value
        else:
            files.append(find_config(value))
    return files, schedule, others


def _bases(path: Path, above: tuple[Path, ...]) -> list[Path]:
    """All files that a configuration builds on, each once, the deepest first."""
    if path in above:
        raise UsageError(f"{path} builds on itself: {' -> '.join(map(str, (*above, path)))}; correct `base:`.")
    names = _named(path, "base") or []
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UsageError(f"{path}: base: {names}; expected a list of YAML files, relative to this one.")
    found: dict[Path, Path] = {}
    for name in names:
        base = _found(name, path, "base")
        for file in [*_bases(base, (*above, path)), base]:
            found.setdefault(file.resolve(), file)
    return list(found.values())


def _found(name: str, path: Path, key: str) -> Path:
    """The file that `path` names under a key."""
    try:
        return find_config(name, path.parent)
    except UsageError as error:
        raise UsageError(f"{path}: {key}: {error}") from error


def _require_one_scheme(groups: Mapping[Path, Sequence[Path]]) -> None:
    """Refuse two configurations of different schemes: the options of one are none of the other.

    Args:
        groups: Each given file, with itself and the files that it builds on.
    """
    schemes: dict[str, Path] = {}
    for path, group in groups.items():
        named = [name for file in group if (name := class_of(Part(file).options().get("model")))]
        schemes |= {named[-1]: path} if named else {}
    if len(schemes) > 1:
        given = " and ".join(f"-c {path} has {name}" for name, path in schemes.items())
        raise UsageError(f"different schemes: {given}; pass one of them, and others that only change its options.")


def _pairs(path: Path) -> list[tuple[Part, set[Path]]]:
    """The sections under `with:` of a file, each with the two files that must both be read for it to apply."""
    node = dict(items(read_node(path))).get(WITH)
    if node is None:
        return []
    if not isinstance(node, yaml.MappingNode):
        raise UsageError(f"{path}: with: expected names of files, each with its options.")
    names = [name for name, _ in items(node)]
    return [(Part(path, (WITH, name)), {path.resolve(), _found(name, path, WITH).resolve()}) for name in names]


def _named(path: Path, key: str) -> Any:
    """The value of a key at the top level of a file."""
    nodes = dict(items(read_node(path)))
    return node_value(nodes[key], path) if key in nodes else None
