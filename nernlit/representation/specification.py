"""Specifications: descriptions of objects as nested dictionaries, which checkpoints contain and compare."""

from collections.abc import Iterator, Mapping
from typing import Any

_LISTED = 8


def differences(given: Mapping[str, Any], stored: Mapping[str, Any]) -> list[str]:
    """What differs between two specifications, one phrase per option.

    >>> differences({"order": "none", "predictor": {"depth": 5}}, {"order": "none", "predictor": {"depth": 3}})
    ['predictor.depth is 5 here and 3 in the checkpoint']
    """
    here, there = dict(options(given)), dict(options(stored))
    found = [
        f"{option} is {_shown(here, option)} here and {_shown(there, option)} in the checkpoint"
        for option in {**here, **there}
        if option not in here or option not in there or here[option] != there[option]
    ]
    if not found and _layers(here) != _layers(there):
        return ["the layers are numbered in another order"]
    more = len(found) - _LISTED
    return [*found[:_LISTED], f"and {more} more"] if more > 1 else found


def options(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values of nested dictionaries, each with its keys joined by dots.

    >>> dict(options({"a": {"b": 1}, "c": 2}))
    {'a.b': 1, 'c': 2}
    """
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from options(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _layers(flat: Mapping[str, Any]) -> list[str]:
    return [option for option in flat if option.startswith("layers.")]


def _shown(flat: Mapping[str, Any], option: str) -> str:
    return repr(flat[option]) if option in flat else "absent"
