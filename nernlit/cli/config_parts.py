"""Parts of configuration files: a file's own options, and its sections."""

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from nernlit.cli.yaml_files import EXAMPLE, node_value, read_node
from nernlit.errors import UsageError

#: Names of sections whose options are added by `--schedule NAME`.
SCHEDULES = ("fast", "paper")
#: Name of the section with options that apply only in combination with another file.
WITH = "with"
#: Keys of a file that are no options of a command.
_FILE_KEYS = ("base", "schedule", WITH, *SCHEDULES)


class Part(NamedTuple):
    """The options of a configuration file, or of one of its sections; as text `FILE::with::NAME::paper::-LEFT_OUT`.

    Attributes:
        file: The file.
        keys: The section's name and those above it; empty for the file's own options.
        left_out: Names of options, with dots, that are left out with all below them.
    """

    file: Path
    keys: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "::".join([str(self.file), *self.keys, *(f"-{name}" for name in self.left_out)])

    @classmethod
    def parse(cls, text: str) -> "Part":
        """The part that a text names."""
        pieces = text.split("::")
        ends = (end for end in range(len(pieces), 0, -1) if Path("::".join(pieces[:end])).is_file())
        end = next(ends, 1)
        keys = [piece for piece in pieces[end:] if not piece.startswith("-")]
        left_out = [piece[1:] for piece in pieces[end:] if piece.startswith("-")]
        return cls(Path("::".join(pieces[:end])), tuple(keys), tuple(left_out))

    def node(self) -> yaml.MappingNode:
        """The options as a YAML node.

        Raises:
            UsageError: If the file cannot be read or the section is no mapping.
        """
        node: yaml.Node = read_node(self.file)
        for depth, key in enumerate(self.keys):
            node = dict(items(node))[key]
            if not isinstance(node, yaml.MappingNode):
                keys = ": ".join(self.keys[: depth + 1])
                raise UsageError(f"{self.file}: {keys}: expected options such as {EXAMPLE}.")
        assert isinstance(node, yaml.MappingNode)
        others = _FILE_KEYS if not self.keys else () if self.keys[-1] in SCHEDULES else SCHEDULES
        return yaml.MappingNode(node.tag, _kept(node, {*others, *self.left_out}), node.start_mark, node.end_mark)

    def options(self) -> dict[str, Any]:
        """The options as nested values."""
        content: dict[str, Any] = node_value(self.node(), str(self))
        return content

    def schedule_sections(self, schedule: str) -> list["Part"]:
        """The section for a schedule; an empty list if there is none."""
        node: yaml.Node = read_node(self.file)
        for key in self.keys:
            node = dict(items(node))[key]
        return [Part(self.file, (*self.keys, schedule))] if schedule in dict(items(node)) else []

    def for_classes(self, own: "Part", later: Sequence["Part"]) -> "Part":
        """This section without the options of classes that later files replace.

        Args:
            own: The part that has this section.
            later: The parts that follow it.
        """
        replaced = _replaced(self.options(), own.options(), [part.options() for part in later])
        return self._replace(left_out=tuple(replaced))


def items(node: yaml.Node) -> list[tuple[str, yaml.Node]]:
    """The names and values of a mapping; nothing of other nodes."""
    return [(key.value, value) for key, value in node.value] if isinstance(node, yaml.MappingNode) else []


def _kept(
    mapping: yaml.MappingNode, left_out: Collection[str], above: str = ""
) -> list[tuple[yaml.ScalarNode, yaml.Node]]:
    """The content of a mapping without these options, as a copy: nodes are shared and never changed."""
    kept = []
    for key, value in mapping.value:
        name = f"{above}{key.value}"
        if isinstance(value, yaml.MappingNode):
            below = _kept(value, left_out, f"{name}.")
            value = yaml.MappingNode(value.tag, below, value.start_mark, value.end_mark)
        if name not in left_out:
            kept.append((key, value))
    return kept


def _replaced(section: Any, own: Any, later: Sequence[Any], name: str = "") -> Iterator[str]:
    """The options of a section that belong to a class that its own file names and a later file replaces."""
    if not isinstance(section, dict) or name == "data":
        return
    named, *others = [found for options in (own, *later) if (found := class_of(options))] or [""]
    if "class_path" not in section and class_of(own) and others and others[-1] != named:
        yield name
        return
    for key, value in section.items():
        below = [options.get(key) if isinstance(options, dict) else None for options in (own, *later)]
        yield from _replaced(value, below[0], below[1:], f"{name}.{key}".removeprefix("."))


def class_of(options: Any) -> str:
    """The name of the class in an option's value, without its module; empty if there is none."""
    path = options.get("class_path") if isinstance(options, dict) else options
    return path.rpartition(".")[2] if isinstance(path, str) else ""
