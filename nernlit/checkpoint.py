"""Representations out of the checkpoints that fits leave behind."""

from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser

from nernlit.errors import CheckpointError, UsageError
from nernlit.representation import Representation

_PREFIX = "representation."


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """A Lightning checkpoint's contents, without unpickling code.

    Raises:
        CheckpointError: If there is no such file, or it is not a checkpoint.
    """
    if not Path(path).is_file():
        raise CheckpointError(f"no checkpoint at {path}; pass the .ckpt that a fit wrote into its checkpoints/ folder.")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises nearly anything for files that are not its own
        raise CheckpointError(f"{path} is not a checkpoint: {str(error).splitlines()[0]}") from error
    if not isinstance(content, dict) or "state_dict" not in content:
        raise CheckpointError(f"{path} holds no state_dict; expected the .ckpt of a fit.")
    return content


def load_representation(
    path: str | Path | None, representation: Representation | None = None
) -> tuple[Representation, dict[str, Any] | None]:
    """The representation of a checkpoint: layout, order, original and predictor as they were fitted.

    Args:
        path: The checkpoint. None returns what is given.
        representation: Filled with the checkpoint's predictor instead of building a new one.

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
        parser = ArgumentParser(exit_on_error=False)
        parser.add_class_arguments(Representation, "representation")
        built = parser.instantiate_classes(parser.parse_object({"representation": described}))
        representation = built.representation
    try:
        representation.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(
            f"{path} was fitted with another representation: {' '.join(str(error).split())[:500]}"
        ) from error
    return representation, described
