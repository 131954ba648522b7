"""Options given together with `--ckpt_path`: they must agree with the options that the checkpoint was fitted with."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nernlit.cli.resume import say
from nernlit.coding import is_nern
from nernlit.errors import CheckpointError, UsageError
from nernlit.representation.specification import options

#: Options of a fit that a resumed one may change; of `rounds`, to more.
_CHANGEABLE = ("on_divergence", "rounds", "min_delta")
#: Networks whose weights may have moved to another path since the fit. The original's are compared by content.
_MOVABLE = ("representation.original", "teacher")
_SHOWN = 3


def require_fitted_options(path: Path, fitted: Mapping[str, Any], given: Mapping[str, Any], command: str) -> None:
    """Refuse model options that differ from those of the checkpoint.

    For a fit all model options are compared; for an evaluation only those of the network.

    Args:
        path: The checkpoint.
        fitted: Its hyper-parameters.
        given: The model's options that were given, without defaults.
        command: `fit`, `validate`, `test` or `predict`.

    Raises:
        UsageError: With the options and both values.
    """
    differing = []
    for name, value in options(given):
        if name == "init_from" or any(name in (f"{part}.checkpoint", f"{part}.pretrained") for part in _MOVABLE):
            continue
        if command != "fit" and not name.startswith(("representation.", "original.")):
            continue
        was = _at(fitted, name)
        if was is ... and name.split(".")[-2:-1] == ["arguments"]:
            was = None  # a network's argument, which had its default
        if name in _CHANGEABLE and (name != "rounds" or was is ... or value >= was):
            continue
        if was is ... or (name == "representation" and value is None) or _same(name, value, was):
            continue
        differing.append(f"{_option(name)} is {_shown(value)}, and the checkpoint has {_shown(was)}")
    if differing:
        more = f" (and {len(differing) - _SHOWN} more)" if len(differing) > _SHOWN else ""
        way_out = "start a new fit" if command == "fit" else "pass the checkpoint of such a fit"
        raise UsageError(
            f"{path} was fitted with other options: {'; '.join(differing[:_SHOWN])}{more}. "
            f"Leave them out (or use the configuration of that fit), or {way_out}."
        )


def take_changes(arguments: Any, given: Mapping[str, Any]) -> None:
    """Set the options that a resumed fit may change to the given ones, in place.

    Args:
        arguments: The module's arguments, as the checkpoint has them.
        given: Those that were given, without defaults.
    """
    for name in _CHANGEABLE:
        if name in given:
            arguments[name] = given[name]


def place_weights(path: Path, arguments: Any, given: Mapping[str, Any], command: str) -> None:
    """Set the current paths of the original's and the teacher's weights, in place.

    Args:
        path: The checkpoint.
        arguments: The module's arguments, as the checkpoint has them.
        given: Those of the configuration, before the checkpoint's took their place.
        command: `fit`, `validate`, `test` or `predict`.

    Raises:
        CheckpointError: If the weights that the checkpoint was fitted with are gone and no others were given.
    """
    if command != "fit" and "teacher" in arguments:
        arguments["teacher"] = None  # evaluations do not use a teacher
    trained = arguments.get("original")  # of an OriginalModule: the checkpoint holds its weights
    if trained is not None and trained.get("checkpoint") and not Path(trained["checkpoint"]).exists():
        trained["checkpoint"] = None
    _place_source(path, arguments, given.get("init_from"))
    for part in _MOVABLE:
        network = arguments.get(part)
        fitted = network.get("checkpoint") if network is not None else None
        if network is None:
            continue
        source = _at(given, f"{part}.checkpoint")
        if isinstance(source, str) and (place := Path(source).expanduser()).exists():
            inside = fitted is not None and place.is_dir() and place.resolve() in Path(fitted).resolve().parents
            if not inside:
                network["checkpoint"], network["pretrained"] = source, False
                continue
        if fitted is None:
            continue
        if not Path(fitted).exists():
            raise CheckpointError(
                f"{path} was fitted with {fitted}, which does not exist any more; "
                f"pass its new path: --model.{part}.checkpoint FILE."
            )
        if isinstance(source, str) and Path(source).suffix and not Path(source).exists():
            say(f"nernlit: --model.{part}.checkpoint {source}: no such file; using {fitted} from the checkpoint")


def _place_source(path: Path, arguments: Any, source: Any) -> None:
    """Set the current path of the .nern file that a fit started from, whose network is its original."""
    fitted = arguments.get("init_from")
    if fitted is None or not is_nern(fitted):
        return
    if isinstance(source, str) and is_nern(source) and (place := Path(source).expanduser()).exists():
        arguments["init_from"] = str(place.absolute())
    elif not Path(fitted).exists():
        raise CheckpointError(
            f"{path} was fitted with {fitted}, which does not exist any more; "
            "pass its new path: --model.init_from FILE."
        )


def _at(tree: Any, name: str) -> Any:
    """The value of a name with dots, or of the last part of it that is no mapping; ... where there is no such name."""
    for key in name.split("."):
        if not isinstance(tree, Mapping):
            return tree  # the value was another one than what is above the name now
        if key not in tree:
            return ...
        tree = tree[key]
    return tree


def _same(name: str, value: Any, was: Any) -> bool:
    if name.endswith(".checkpoint") and isinstance(value, str) and isinstance(was, str):
        return Path(value).expanduser().resolve() == Path(was).resolve()
    if isinstance(value, list | tuple) and isinstance(was, list | tuple):
        return list(value) == list(was)
    return bool(value == was)


def _option(name: str) -> str:
    return f"--model.{name.replace('.init_args', '')}"


def _shown(value: Any) -> str:
    return (
        str(value.get("class_path", value)) if isinstance(value, Mapping) else "null" if value is None else str(value)
    )
