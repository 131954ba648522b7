"""`nernlit configs`: list the shipped configurations; `nernlit configs copy NAME`: write one as a file of its own."""

import re
import textwrap
from collections.abc import Iterable, Mapping
from itertools import groupby, takewhile
from pathlib import Path
from typing import Any

import yaml

from nernlit import __version__
from nernlit.cli.arguments import CommandParser, path
from nernlit.cli.config_parts import Part
from nernlit.cli.configs import base_files, config_parts, expand_bases, shipped_configs
from nernlit.cli.parser_errors import closest
from nernlit.errors import UsageError
from nernlit.storage.files import write_atomically

_COLUMNS = 80
_NAME_COLUMNS = 28
_ORDER = ("model", "data", "trainer")


def main(args: Iterable[str]) -> None:
    """List the configurations that come with nernlit. `nernlit configs copy NAME` writes one as a file of its own."""
    given = list(args)
    if given[:1] == ["copy"]:
        _copy(given[1:])
        return
    CommandParser("configs", main.__doc__).parse_args(given)
    for line in listing():
        print(line)


def listing() -> list[str]:
    """Every shipped configuration with what it is, in 80 columns, one paragraph per dataset."""
    lines: list[str] = []
    configs = sorted(shipped_configs().items(), key=lambda item: _sort_key(item[0]))
    for _, group in groupby(configs, key=lambda item: item[0].partition("_")[0]):
        texts = {name: _comment(path) for name, path in group}
        # The cells of the tables begin with the same words, "CIFAR-10 ResNet20, hidden width ...".
        heading = next(text for name, text in texts.items() if _width(name)).partition(", hidden ")[0]
        lines.append(heading)
        for name, text in texts.items():
            lines += _entry(name, text.removeprefix(f"{heading}, hidden "))
        lines.append("")
    lines.append("Files to build on, as in `base: [recon_only, cifar10]`")
    for name, file in base_files().items():
        lines += _entry(name, f"{_comment(file).partition('. ')[0].rstrip('.')}.")
    return [
        *lines,
        "",
        "Run one from any folder: nernlit fit -c NAME",
        "Write one to edit:       nernlit configs copy NAME",
    ]


def _width(name: str) -> int:
    """The hidden width that a name says; 0 where it says none."""
    found = re.search(r"_h(\d+)", name)
    return int(found[1]) if found else 0


def _sort_key(name: str) -> tuple[str, int, str]:
    return name.partition("_")[0], _width(name), name


def _entry(name: str, text: str) -> list[str]:
    indent = " " * (_NAME_COLUMNS + 2)
    lines = textwrap.wrap(text, _COLUMNS, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)
    if len(name) >= _NAME_COLUMNS:
        return [f"  {name}", *lines]
    return [f"  {name:{_NAME_COLUMNS}}{lines[0].lstrip()}", *lines[1:]]


def _comment(path: Path) -> str:
    """The comment that a file begins with."""
    lines = takewhile(lambda line: line.startswith("#"), path.read_text(encoding="utf-8").splitlines())
    return " ".join(line.lstrip("# ") for line in lines)


def _copy(args: list[str]) -> None:
    """Write a shipped configuration with all its base files as one YAML file, which runs by itself."""
    parser = CommandParser("configs copy", _copy.__doc__)
    parser.add_argument("name", metavar="NAME", help="a name that `nernlit configs` lists")
    parser.add_argument("-o", "--out", type=path, help="file to write (default: NAME.yaml)")
    options = parser.parse_args(args)
    out = Path(f"{options.name}.yaml") if options.out is None else options.out
    content = self_contained(options.name)
    if out.is_symlink() or out.exists():
        raise UsageError(f"{out} exists; pass -o FILE for another place, or remove it first.")
    write_atomically(out, content.encode())
    print(f"written: {out} (run it with: nernlit fit -c {out})")


def self_contained(name: str) -> str:
    """The YAML of a shipped configuration merged with everything that it builds on, for both schedules.

    Raises:
        UsageError: If there is no shipped configuration of this name, or it is a file to build on.
    """
    shipped = shipped_configs()
    if name in base_files():
        raise UsageError(
            f"{name!r} is a base file and cannot be run alone; use it in a configuration of your own: `base: [{name}]`."
        )
    if name not in shipped:
        close = closest(name, shipped)
        hint = f" (did you mean {' or '.join(close)}?)" if close else ""
        raise UsageError(f"there is no shipped configuration {name!r}{hint}; `nernlit configs` lists them.")
    path = str(shipped[name])
    plain = config_parts(expand_bases(["-c", path, "--schedule", "fast"]))
    try:
        scheduled = config_parts(expand_bases(["-c", path, "--schedule", "paper"]))[len(plain) :]
    except UsageError:  # it has no other schedule
        scheduled = []
    comment = [
        *textwrap.wrap(_comment(shipped[name]), 118),
        f"Written by `nernlit configs copy {name}` (nernlit {__version__}).",
    ]
    text = "".join(f"# {line}\n" for line in comment) + _dump(merged_options(plain))
    return text + (
        f"\n# Options that `--schedule paper` adds.\n{_dump({'paper': merged_options(scheduled)})}" if scheduled else ""
    )


def _dump(options: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(options), sort_keys=False, default_flow_style=None, width=100)


def merged_options(parts: Iterable[Part]) -> dict[str, Any]:
    """The options of several parts of configuration files, of which later ones win."""
    options: dict[str, Any] = {}
    for part in parts:
        options = _merge(options, part.options(), "")
    return dict(sorted(options.items(), key=lambda item: _ORDER.index(item[0]) if item[0] in _ORDER else -1))


def _merge(former: Any, later: Any, key: str) -> Any:
    """One value over another, as the parser merges files: mappings are joined, everything else is replaced.

    A new class replaces the arguments of the former one; those of `data` are shared by all its classes and stay.
    """
    if not isinstance(former, dict) or not isinstance(later, dict):
        return later
    if key != "data" and "class_path" in later and later["class_path"] != former.get("class_path"):
        return later
    return former | {name: _merge(former.get(name), value, name) for name, value in later.items()}
