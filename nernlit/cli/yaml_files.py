"""Checked reading of YAML files: what cannot be a configuration is refused with its line, and no objects are made."""

import contextlib
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from nernlit.errors import UsageError

#: YAML nodes with all aliases expanded; a small file of nested aliases can stand for billions.
_MOST_NODES = 100_000
EXAMPLE = "`trainer: {max_epochs: 8}`"


def read_config(path: Path) -> dict[str, Any]:
    """The values of a configuration file, such as the `config.yaml` of a run.

    Raises:
        UsageError: If it is missing or no valid configuration.
    """
    content: dict[str, Any] = node_value(read_node(path), path)
    return content


def node_value(node: yaml.Node, source: Path | str) -> Any:
    """The plain values (mappings, lists, numbers, texts) of a YAML node.

    Raises:
        UsageError: If it has a tag that makes an object, or a date that does not exist.
    """
    try:
        return yaml.safe_load(yaml.serialize(node))
    except (ValueError, yaml.YAMLError) as error:
        raise UsageError(f"{source} is not a valid configuration: {' '.join(str(error).split())}") from error


def read_node(path: Path) -> yaml.MappingNode:
    """The root of a configuration file, without making objects of its values. It is shared: do not change it.

    Raises:
        UsageError: If it is missing, unreadable, no YAML mapping, or says a key twice.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise UsageError(f"no configuration file {path}; `nernlit configs` lists the shipped ones.") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not a text file in UTF-8; expected a YAML configuration.") from error
    except (OSError, ValueError) as error:
        raise UsageError(
            f"cannot read the configuration {path}: {getattr(error, 'strerror', None) or error}."
        ) from error
    return _checked(path, text)


@lru_cache(maxsize=128)  # the same files are read for their bases, their sections and their options
def _checked(path: Path, text: str) -> yaml.MappingNode:
    """The root of a text; nobody may change it."""
    try:
        root = yaml.compose(text, yaml.SafeLoader)
    except (yaml.YAMLError, RecursionError) as error:
        raise UsageError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if root is None:
        raise UsageError(f"{path} is empty; expected options such as {EXAMPLE}.")
    if not isinstance(root, yaml.MappingNode):
        raise UsageError(f"{path} holds no options; expected a YAML mapping such as {EXAMPLE}.")
    _refuse_duplicates(path, root)
    return root


def refuse_inline_duplicates(value: str) -> None:
    """Refuse a mapping on the command line that says a key twice."""
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
