"""What the schemes that look at images share: a teacher, the student's forward pass, distillation terms."""

from abc import ABC
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from nernlit.errors import CheckpointError, DataError, UsageError
from nernlit.losses import feature_map_loss, kd_loss
from nernlit.originals import NERN_TAPS, FeatureTaps, Folded, Original
from nernlit.representation import Representation
from nernlit.training.base import Precision, ReconstructionModule
from nernlit.training.classifier import ImageBatch
from nernlit.utilities.constants import WithConstants


class DistillingModule(ReconstructionModule, WithConstants, ABC):
    """A scheme that compares the reconstructed CNN's answers with a teacher's.

    Args:
        representation: What is trained.
        optimizer: Makes the optimizer from the predictor's parameters.
        scheduler: Makes the schedule from the optimizer.
        teacher: Whose logits are learned: any classifier of the same classes; the original by default.
        taps: Modules whose feature maps are compared; see `FeatureTaps`.
        precision: Of the predictor and the CNNs in training steps.
    """

    own_teacher: Original | None = None

    def __init__(
        self,
        representation: Representation,
        optimizer: OptimizerCallable,
        scheduler: LRSchedulerCallable | None = None,
        teacher: Original | None = None,
        taps: Sequence[str] = NERN_TAPS,
        precision: Precision = "bf16",
    ) -> None:
        super().__init__(representation, optimizer, scheduler, precision)
        self.taps = taps
        self._folded_pair: tuple[Folded, Folded] | None = None
        if teacher is not None:
            teacher.require_weights("teacher")
            if teacher.num_classes != self.num_classes:
                raise UsageError(
                    f"the teacher {teacher.name!r} has {teacher.num_classes} classes, the original "
                    f"{representation.original.name!r} has {self.num_classes}; both must know the same classes."
                )
            self.set_constant("own_teacher", teacher.freeze())

    def needs_images(self, stage: str) -> bool:
        return stage == "fit"

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self._folded_pair = None
        data = getattr(self.trainer, "datamodule", None)
        if stage == "fit" and getattr(data, "train_on", None) == "none":
            raise UsageError(f"{type(self).__name__} needs images; pass --data.train_on images (or noise).")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        if self.own_teacher is not None:
            checkpoint["teacher"] = self.own_teacher.fingerprint()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to go on with another teacher; an evaluation asks none."""
        super().on_load_checkpoint(checkpoint)
        fitted = checkpoint.get("teacher")
        own = None if self.own_teacher is None else self.own_teacher.fingerprint()
        if self.trainer.state.fn == "fit" and fitted != own:
            raise CheckpointError(
                f"the fit had {_shown(fitted)}, and this one has {_shown(own)}; pass the teacher that it had "
                "(--model.teacher), or start a new fit with --model.init_from."
            )

    def student_terms(
        self,
        batch: ImageBatch,
        weights: Mapping[str, Tensor],
        kd_weight: float,
        feature_weight: float,
        **kd_options: float,
    ) -> tuple[dict[str, Tensor], Tensor]:
        """The weighted distillation terms of predicted weights, and the student's logits (B, C).

        A term whose weight is zero costs nothing.
        """
        images_BCHW = _checked_images(batch)
        student, teacher = self._folded(images_BCHW[:2], bool(feature_weight))
        terms: dict[str, Tensor] = {}
        if feature_weight:
            tapped = FeatureTaps(student.net, self.taps)
            with tapped.collect() as student_maps:
                student_BC = self._run(student, images_BCHW, weights)
            with tapped.collect() as original_maps, torch.no_grad():
                original_BC = self._run(student, images_BCHW)
            terms["features"] = feature_weight * feature_map_loss(student_maps, original_maps)
        else:
            student_BC = self._run(student, images_BCHW, weights)
        if kd_weight:
            if feature_weight and teacher is student:
                teacher_BC = original_BC
            else:
                with torch.inference_mode():
                    teacher_BC = self._run(teacher, images_BCHW)
                teacher_BC = teacher_BC.clone()  # autograd cannot keep inference tensors
            terms["kd"] = kd_weight * kd_loss(student_BC, teacher_BC, **kd_options)
        return terms, student_BC

    def _folded(self, images_BCHW: Tensor, tapped: bool) -> tuple[Folded, Folded]:
        """The original, which is the student when it gets other weights, and the teacher. Folded at their first use."""
        if self._folded_pair is None:
            original = self.representation.original
            read = FeatureTaps(original.net, self.taps).taps if tapped else ()
            student = Folded(original, images_BCHW, read)
            own = self.own_teacher
            self._folded_pair = student, student if own is None else Folded(own, images_BCHW)
        return self._folded_pair

    def _run(self, cnn: Folded, images_BCHW: Tensor, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """Logits (B, C); NHWC in memory, which convolutions like best on CPUs and GPUs alike."""
        with self.autocast():
            return cnn(images_BCHW.contiguous(memory_format=torch.channels_last), weights)


def _shown(fingerprint: str | None) -> str:
    return "no teacher of its own" if fingerprint is None else f"a teacher of SHA-256 {fingerprint[:12]}..."


def _checked_images(batch: Any) -> Tensor:
    if not isinstance(batch, tuple | list) or len(batch) != 2 or not isinstance(batch[0], Tensor):
        raise DataError(f"a training batch is {type(batch).__name__}; expected (images, labels).")
    return batch[0]
