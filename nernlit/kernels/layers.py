"""Which convolutions of a network are predicted."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal

from nernlit.errors import LayoutError

LayerPreset = Literal["all_convs", "stages_3x3"]


@dataclass(frozen=True)
class LayerFilter:
    """Selects the convolutions that are predicted; all others keep the original's weights.

    Every pattern and every kernel size must match at least one convolution of the network.

    Args:
        include: Shell patterns of module names, for example `layer1.*`; a layer is selected if any of them matches.
        exclude: Shell patterns of module names that are not selected, although `include` matches them.
        kernel_sizes: Select only layers whose larger kernel side is listed; None selects every size.

    Raises:
        LayoutError: If `include` or `exclude` is not a list of patterns, or `kernel_sizes` not a list of integers.
    """

    include: list[str] = field(default_factory=lambda: ["*"])
    exclude: list[str] = field(default_factory=list)
    kernel_sizes: list[int] | None = None

    def __post_init__(self) -> None:
        for option, wanted in (("include", str), ("exclude", str), ("kernel_sizes", int)):
            given = getattr(self, option)
            if given is None and option == "kernel_sizes":
                continue
            if (
                isinstance(given, str)
                or not isinstance(given, Sequence)
                or not all(isinstance(x, wanted) for x in given)
            ):
                example = {"include": '["layer1.*"]', "exclude": '["*.downsample.*"]', "kernel_sizes": "[3]"}[option]
                raise LayoutError(f"layers.{option}={given!r}; expected a list, for example {example}.")


#: The paper's choices: all convolutions (CIFAR, STL), and the 3x3 ones of the four stages (ImageNet ResNets).
PRESETS: dict[LayerPreset, LayerFilter] = {
    "all_convs": LayerFilter(),
    "stages_3x3": LayerFilter(include=["layer[1-4].*"], kernel_sizes=[3]),
}


def chosen(
    convs: Mapping[str, Sequence[str]], sizes: Mapping[str, int], layers: LayerPreset | LayerFilter
) -> list[str]:
    """The state-dict keys of the weights that are predicted.

    Args:
        convs: State-dict key of each convolution's weight -> names of the modules that use it. A weight is selected if
            at least one of these names is included and none is excluded.
        sizes: The same keys -> larger kernel side.
        layers: The selection.

    Raises:
        LayoutError: If a pattern or a kernel size matches no convolution, or no convolution is selected.
    """
    rule = _rule(layers)
    if not convs:
        raise LayoutError("the network has no Conv2d, so there is nothing to predict.")
    for option, patterns in (("include", rule.include), ("exclude", rule.exclude)):
        for pattern in patterns:
            if not any(_match(names, [pattern]) for names in convs.values()):
                where = f"layers.{option}" if layers is rule else f"layers={layers!r}"
                raise _matches_nothing(where, pattern, [name for own in convs.values() for name in own])
    named = [key for key, own in convs.items() if _match(own, rule.include) and not _match(own, rule.exclude)]
    there = sorted({sizes[key] for key in named})
    for size in rule.kernel_sizes or ():
        if size not in there:
            raise LayoutError(
                f"layers.kernel_sizes: none of the included convolutions has kernels of size {size}; "
                f"their sizes are {', '.join(map(str, there)) or 'none'}."
            )
    taken = [key for key in named if rule.kernel_sizes is None or sizes[key] in rule.kernel_sizes]
    if not taken:
        raise LayoutError(
            f"layers={layers!r} selects none of the network's {len(convs)} convolutions (first: "
            f"{', '.join(own[0] for own in list(convs.values())[:5])}). Widen --model.representation.layers."
        )
    return taken


def _rule(layers: LayerPreset | LayerFilter) -> LayerFilter:
    if isinstance(layers, LayerFilter):
        return layers
    if not isinstance(layers, str) or layers not in PRESETS:
        raise LayoutError(
            f"layers={layers!r}; expected {' or '.join(map(repr, PRESETS))}, or a LayerFilter(include=[...], "
            "exclude=[...], kernel_sizes=[...])."
        )
    return PRESETS[layers]


def _match(names: Iterable[str], patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for name in names for pattern in patterns)


def _matches_nothing(where: str, pattern: str, names: Sequence[str]) -> LayoutError:
    """The error, with patterns that do match: `name.*` if `name` is a parent module, or similarly spelled names."""
    below = sorted({f"{name[:at]}.*" for name in names for at, character in enumerate(name) if character == "."})
    close = [f"{pattern}.*"] if f"{pattern}.*" in below else difflib.get_close_matches(pattern, [*below, *names], 3)
    known = f"the convolutions are {', '.join(names[:5])}, ..."
    hint = f"did you mean {', '.join(map(repr, close))}?" if close else known
    return LayoutError(
        f"{where}: the pattern {pattern!r} matches no convolution; {hint} "
        "Patterns are compared with whole module names, and each pattern must match at least one."
    )
