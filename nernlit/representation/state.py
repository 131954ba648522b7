"""A check that a checkpoint belongs to a representation with the same specification and original."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nernlit.errors import CheckpointError
from nernlit.representation.specification import differences

_KINDS = {"original": str, "specification": dict, "scale": Tensor, "order": Tensor}


def require_compatible(own: Mapping[str, Any], stored: Any) -> None:
    """Refuse the extra state of a checkpoint that belongs to a different representation.

    Args:
        own: The original's fingerprint, the specification and the scale of a representation.
        stored: The extra state in a checkpoint; see `Representation.get_extra_state`.

    Raises:
        CheckpointError: If the originals' fingerprints, the specifications or the scales differ, or `stored` is no such
            state.
    """
    if not isinstance(stored, dict) or any(not isinstance(stored.get(key), kind) for key, kind in _KINDS.items()):
        raise CheckpointError(
            "the checkpoint does not say how its representation is built: it was written by another version of "
            "nernlit. Fit it again with this one."
        )
    if stored["original"] != own["original"]:
        raise CheckpointError(
            f"the checkpoint was fitted to another original (SHA-256 {stored['original'][:12]}..., this one's is "
            f"{own['original'][:12]}...); pass the weights that it was fitted to "
            "(--model.representation.original.checkpoint)."
        )
    if differing := differences(own["specification"], stored["specification"]):
        raise CheckpointError(
            f"the checkpoint was fitted with another representation: {'; '.join(differing)}. Use the checkpoint's "
            "values; with init_from, leave `representation` out to take them all from the checkpoint."
        )
    scale = stored["scale"]
    if scale.shape != own["scale"].shape or not torch.allclose(scale.float(), own["scale"].float(), rtol=1e-4):
        raise CheckpointError("the checkpoint is damaged: its scale is wrong. Pass another one.")
