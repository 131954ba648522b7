"""Representations out of the checkpoints that fits write."""

from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from nernlit.errors import CheckpointError, UsageError
from nernlit.representation.representation import Representation
from nernlit.storage.checkpoint import read_checkpoint

_PREFIX = "representation."


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
