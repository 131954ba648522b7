"""Which weights of a network are predicted."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal, get_args

from nernlit.errors import LayoutError
from nernlit.utilities.text import abbreviated

LayerPreset = Literal["all_convs", "stages_3x3", "all_linear", "all"]
#: `conv`: convolutions and transposed convolutions of 1 to 3 dimensions. `linear`: `Linear` layers, and the projections
#: of queries, keys and values that `MultiheadAttention` holds itself.
LayerType = Literal["conv", "linear"]


@dataclass(frozen=True)
class Candidate:
    """A weight that can be predicted.

    Attributes:
        shape: Its shape.
        type: The type of its layer.
        names: The names of the layers that use it.
    """

    shape: tuple[int, ...]
    type: LayerType
    names: list[str] = field(default_factory=list)

    @property
    def kernel_size(self) -> int:
        """The largest side of its kernels; 1 for a linear layer."""
        return max(self.shape[2:], default=1)


_EXAMPLES = {
    "include": '["layer1.*"]',
    "exclude": '["*.downsample.*"]',
    "kernel_sizes": "[3]",
    "types": '["conv", "linear"]',
}


@dataclass(frozen=True)
class LayerFilter:
    """Selects the layers whose weights are predicted; all others keep the original's weights.

    Every pattern and every kernel size must match at least one layer of the selected types.

    Args:
        include: Shell patterns of module names, for example `layer1.*`; a layer is selected if any of them matches.
        exclude: Shell patterns of module names that are not selected, although `include` matches them.
        kernel_sizes: Select only layers whose largest kernel side is listed (1 for linear layers); None selects every
            size.
        types: Select only layers of these types: `conv`, `linear`.

    Raises:
        LayoutError: If `include` or `exclude` is not a list of patterns, `kernel_sizes` not a list of integers, or
            `types` not a list of types.
    """

    include: list[str] = field(default_factory=lambda: ["*"])
    exclude: list[str] = field(default_factory=list)
    kernel_sizes: list[int] | None = None
    types: list[LayerType] = field(default_factory=lambda: ["conv"])

    def __post_init__(self) -> None:
        for option, wanted in (("include", str), ("exclude", str), ("kernel_sizes", int), ("types", str)):
            given = getattr(self, option)
            if given is None and option == "kernel_sizes":
                continue
            if (
                isinstance(given, str)
                or not isinstance(given, Sequence)
                or not all(isinstance(x, wanted) for x in given)
            ):
                raise LayoutError(f"layers.{option}={given!r}; expected a list, for example {_EXAMPLES[option]}.")
        if not self.types or not set(self.types) <= set(get_args(LayerType)):
            raise LayoutError(f"layers.types={self.types!r}; expected a list of {' and '.join(get_args(LayerType))}.")


#: The paper's choices are all convolutions (CIFAR, STL), and the 3x3 ones of the four stages (ImageNet ResNets).
PRESETS: dict[LayerPreset, LayerFilter] = {
    "all_convs": LayerFilter(),
    "stages_3x3": LayerFilter(include=["layer[1-4].*"], kernel_sizes=[3]),
    "all_linear": LayerFilter(types=["linear"]),
    "all": LayerFilter(types=["conv", "linear"]),
}


def select_layers(found: Mapping[str, Candidate], layers: LayerPreset | LayerFilter) -> list[str]:
    """The state-dict keys of the weights that are predicted.

    Args:
        found: State-dict key -> weight, of the selection's types. A weight is selected if at least one of its names is
            included and none is excluded.
        layers: The selection.

    Raises:
        LayoutError: If a pattern or a kernel size matches no layer, or no layer is selected.
    """
    rule = as_filter(layers)
    one, several = _nouns(rule)
    if not found:
        raise LayoutError(
            f"the network has no {one}, so there is nothing to predict. Convolutions are selected by "
            "--model.representation.layers=all_convs, linear layers by all_linear, both by all."
        )
    for option, patterns in (("include", rule.include), ("exclude", rule.exclude)):
        for pattern in patterns:
            if not any(_match(weight.names, [pattern]) for weight in found.values()):
                where = f"layers.{option}" if layers is rule else f"layers={layers!r}"
                names = [name for weight in found.values() for name in weight.names]
                raise _matches_nothing(where, pattern, names, one, several)
    named = {
        key: weight
        for key, weight in found.items()
        if _match(weight.names, rule.include) and not _match(weight.names, rule.exclude)
    }
    there = sorted({weight.kernel_size for weight in named.values()})
    for size in rule.kernel_sizes or ():
        if size not in there:
            raise LayoutError(
                f"layers.kernel_sizes: none of the included {several} has kernels of size {size}; "
                f"their sizes are {', '.join(map(str, there)) or 'none'}."
            )
    taken = [
        key for key, weight in named.items() if rule.kernel_sizes is None or weight.kernel_size in rule.kernel_sizes
    ]
    if not taken:
        first = abbreviated([weight.names[0] for weight in found.values()])
        raise LayoutError(
            f"layers={layers!r} selects none of the network's {len(found)} {several} ({first}). "
            "Select more layers with --model.representation.layers."
        )
    return taken


def as_filter(layers: LayerPreset | LayerFilter) -> LayerFilter:
    """The filter of a selection.

    Raises:
        LayoutError: If it is neither a preset nor a filter.
    """
    if isinstance(layers, LayerFilter):
        return layers
    if not isinstance(layers, str) or layers not in PRESETS:
        raise LayoutError(
            f"layers={layers!r}; expected {' or '.join(map(repr, PRESETS))}, or a LayerFilter(include=[...], "
            "exclude=[...], kernel_sizes=[...], types=[...])."
        )
    return PRESETS[layers]


def _nouns(rule: LayerFilter) -> tuple[str, str]:
    """What error messages call one and several layers of a selection's types."""
    if set(rule.types) == {"conv"}:
        return "convolution", "convolutions"
    return ("linear layer", "linear layers") if set(rule.types) == {"linear"} else ("layer", "layers")


def _match(names: Iterable[str], patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for name in names for pattern in patterns)


def _matches_nothing(where: str, pattern: str, names: Sequence[str], one: str, several: str) -> LayoutError:
    """The error, with patterns that do match: `name.*` if `name` is a parent module, or similarly spelled names."""
    below = sorted({f"{name[:at]}.*" for name in names for at, character in enumerate(name) if character == "."})
    close = [f"{pattern}.*"] if f"{pattern}.*" in below else difflib.get_close_matches(pattern, [*below, *names], 3)
    known = f"the {several} are {abbreviated(names)}."
    hint = f"did you mean {', '.join(map(repr, close))}?" if close else known
    return LayoutError(
        f"{where}: the pattern {pattern!r} matches no {one}; {hint} "
        "Patterns are compared with whole module names, and each pattern must match at least one."
    )
