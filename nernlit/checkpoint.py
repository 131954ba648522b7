"""Representations out of the checkpoints that fits leave behind."""

import contextlib
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser
from torch import Tensor

from nernlit.errors import CheckpointError, UsageError
from nernlit.file_kinds import describe_file, zip_damage
from nernlit.representation import Representation

_PREFIX = "representation."


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """A Lightning checkpoint's contents, without unpickling code.

    Raises:
        CheckpointError: If there is no such file, it is something else, or it is damaged: a wrong checksum, or a weight
            or an optimizer's state that is not finite.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}; pass the .ckpt that a fit wrote into its checkpoints/ folder.")
    content: Any = None
    if zip_damage(path) is None:
        with contextlib.suppress(Exception):  # torch raises nearly anything for files that are not its own
            content = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
        raise CheckpointError(
            f"{path} is {describe_file(path)}. Pass a .ckpt that a fit wrote into its checkpoints/ folder."
        )
    for part in ("state_dict", "optimizer_states"):
        name = _not_finite(content.get(part), part)
        if name is not None:
            raise CheckpointError(
                f"{path} is damaged, or its fit diverged: {name} holds values that are not finite. "
                "Pass another checkpoint."
            )
    return content


def _not_finite(value: Any, name: str) -> str | None:
    """The name of the first tensor or number in nested containers that is infinite or not a number."""
    if isinstance(value, Tensor):
        return None if bool(value.isfinite().all()) else name
    if isinstance(value, float):
        return None if math.isfinite(value) else name
    inside: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, Mapping):
        inside = value.items()
    elif isinstance(value, list | tuple):
        inside = enumerate(value)
    return next((found for key, part in inside if (found := _not_finite(part, f"{name}.{key}")) is not None), None)


def newest_whole_checkpoint(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest file of a `checkpoints/` folder that can be read, and its contents; None if there is none."""
    for path in sorted(folder.glob("*.ckpt"), key=lambda path: path.stat().st_mtime, reverse=True):
        with contextlib.suppress(CheckpointError):
            return path, read_checkpoint(path)
    return None


def load_representation(
    path: str | Path | None, representation: Representation | None = None, original: str | Path | None = None
) -> tuple[Representation, dict[str, Any] | None]:
    """The representation of a checkpoint: layout, order, original and predictor as they were fitted.

    Args:
        path: The checkpoint. None returns what is given.
        representation: Filled with the checkpoint's predictor instead of building a new one.
        original: File of the original's weights, where it is no longer where the checkpoint says.

    Returns:
        The representation, and its description in primitives where the checkpoint has one.

    Raises:
        CheckpointError: If the checkpoint cannot be read, describes no representation or does not fit the given one.
        UsageError: If neither is given.
    """
    if path is None:
        if representation is None:
            raise UsageError("neither a representation nor a checkpoint (init_from) is given; pass one of them.")
        return representation, None
    content = read_checkpoint(path)
    state = {k.removeprefix(_PREFIX): v for k, v in content["state_dict"].items() if k.startswith(_PREFIX)}
    described = content.get("hyper_parameters", {}).get("representation")
    if not state:
        raise CheckpointError(f"{path} holds no representation; pass a checkpoint of Recon-only or another scheme.")
    if representation is None:
        if described is None:
            raise CheckpointError(
                f"{path} does not say how its representation is built (it was not written by the command line); "
                "build the same representation and pass it too."
            )
        described = _with_original(path, described, original)
        parser = ArgumentParser(exit_on_error=False)
        parser.add_class_arguments(Representation, "representation")
        built = parser.instantiate_classes(parser.parse_object({"representation": described}))
        representation = built.representation
    try:
        representation.load_state_dict(state)
    except (CheckpointError, RuntimeError) as error:
        raise CheckpointError(f"{path}: {' '.join(str(error).split())[:2000]}") from error
    return representation, described


def _with_original(path: str | Path, described: dict[str, Any], original: str | Path | None) -> dict[str, Any]:
    """The description, with the original's weights where they are now."""
    fitted = described["original"]
    if original is not None:
        return {**described, "original": {**fitted, "checkpoint": str(original), "pretrained": False}}
    if fitted.get("checkpoint") and not Path(fitted["checkpoint"]).exists():
        raise CheckpointError(
            f"{path} was fitted with {fitted['checkpoint']}, which is gone; say where it is now: --original FILE of "
            "`analyze` and `report`, or beside --model.init_from the whole --model.representation."
        )
    return described
