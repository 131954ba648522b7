"""The teacher of a fit: a frozen classifier whose logits are learned."""

from collections.abc import Mapping
from typing import Any

from nernlit.errors import CheckpointError, UsageError
from nernlit.originals import Original


def frozen_teacher(teacher: Original, original: Original) -> Original:
    """The teacher, frozen.

    Args:
        teacher: A classifier.
        original: The network that learns from it.

    Raises:
        UsageError: If the teacher is no `Original`, has random weights, or other classes than the original.
    """
    if not isinstance(teacher, Original):
        raise UsageError(
            f"teacher is a {type(teacher).__name__}; pass an Original (for a network in memory: Original.from_module)."
        )
    teacher.require_weights("teacher")
    if teacher.num_classes != original.num_classes:
        raise UsageError(
            f"the teacher {teacher.name!r} has {teacher.num_classes} classes, the original "
            f"{original.name!r} has {original.num_classes}; both must have the same classes."
        )
    return teacher.freeze()


def require_same_teacher(teacher: Original | None, checkpoint: Mapping[str, Any]) -> None:
    """Refuse to resume a fit with another teacher than it was fitted with.

    Args:
        teacher: The teacher; None if there is no separate one.
        checkpoint: The checkpoint, with the teacher's fingerprint as `teacher` if its fit had one.

    Raises:
        CheckpointError: If the fingerprints differ.
    """
    fitted, own = checkpoint.get("teacher"), None if teacher is None else teacher.fingerprint()
    if fitted != own:
        raise CheckpointError(
            f"the checkpoint's fit had {_shown(fitted)}, this one has {_shown(own)}; pass the same teacher "
            "(--model.teacher), or start a new fit."
        )


def _shown(fingerprint: str | None) -> str:
    return "no separate teacher" if fingerprint is None else f"a teacher of SHA-256 {fingerprint[:12]}..."
