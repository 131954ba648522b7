"""Reading the checkpoints that fits write, without unpickling code."""

import contextlib
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nernlit.errors import CheckpointError
from nernlit.storage.file_kinds import describe_file, zip_damage


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """A Lightning checkpoint's contents, without unpickling code.

    Its entries `state_dict` and `hyper_parameters` (empty where there is none) are dictionaries with texts as keys.

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
    if not isinstance(content, dict) or not all(
        isinstance(part, dict) and all(isinstance(key, str) for key in part)
        for part in (content.get("state_dict"), content.setdefault("hyper_parameters", {}))
    ):
        raise CheckpointError(
            f"{path} is {describe_file(path)}. Pass a .ckpt that a fit wrote into its checkpoints/ folder."
        )
    for part in ("state_dict", "optimizer_states"):
        try:
            name = _not_finite(content.get(part), part)
        except RecursionError as error:
            raise CheckpointError(f"{path} is damaged: {part} contains itself. Pass another checkpoint.") from error
        if name is not None:
            raise CheckpointError(
                f"{path} is damaged, or its fit diverged: {name} holds values that are not finite. "
                "Pass another checkpoint."
            )
    return content


def _not_finite(value: Any, name: str) -> str | None:
    """The first tensor or number in nested containers that is infinite or not a number, or a tensor without values."""
    if isinstance(value, Tensor):
        is_plain = value.layout == torch.strided and not value.is_meta
        return None if is_plain and bool(value.isfinite().all()) else name
    if isinstance(value, float):
        return None if math.isfinite(value) else name
    inside: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, Mapping):
        inside = value.items()
    elif isinstance(value, list | tuple):
        inside = enumerate(value)
    return next((found for key, part in inside if (found := _not_finite(part, f"{name}.{key}")) is not None), None)


def newest_intact_checkpoint(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The whole file of a `checkpoints/` folder with the latest step, and its contents; None if no file is whole.

    Modification times are not used: a clock may be wrong, and copies have new times.
    """
    newest: tuple[Path, dict[str, Any]] | None = None
    for path in sorted(folder.glob("*.ckpt")):
        with contextlib.suppress(CheckpointError):
            content = read_checkpoint(path)
            if newest is None or _step(content) > _step(newest[1]):
                newest = path, content
    return newest


def _step(content: Mapping[str, Any]) -> int:
    step = content.get("global_step")
    return step if isinstance(step, int) else -1
