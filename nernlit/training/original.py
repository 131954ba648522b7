"""Training of an original, for users who do not have a checkpoint."""

from collections.abc import Callable, Iterable
from typing import Any, final

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.functional import cross_entropy

from nernlit.errors import UsageError, require_at_least, require_positive
from nernlit.losses import high_frequency_share, kd_loss
from nernlit.originals import Original
from nernlit.training.batches import images_of, labels_of
from nernlit.training.class_names import take_class_names
from nernlit.training.classifier import ClassifierModule
from nernlit.training.evaluation import ImageBatch
from nernlit.training.teachers import frozen_teacher, require_same_teacher
from nernlit.utilities.constants import WithConstants


@final
class OriginalModule(ClassifierModule, WithConstants):
    """Trains a CNN with cross-entropy on labeled images, and optionally on a teacher's logits.

    Its checkpoints, and the files that `predict` writes, can be used as an original's `checkpoint`.

    Args:
        original: The CNN to train, from random weights or from its checkpoint.
        optimizer: Creates the optimizer from the CNN's parameters.
        scheduler: Creates the learning-rate schedule from the optimizer.
        label_smoothing: Probability mass that is distributed over all classes, at least 0 and below 1.
        teacher: A classifier with the same classes whose logits are learned too: conventional knowledge distillation.
        kd_weight: Weight of the KL divergence from the teacher, beside the cross-entropy's weight of 1.
        temperature: Softmax temperature of CNN and teacher in that divergence.
        high_frequency_weight: Weight of the share of the convolutions' energy in the smaller half of their singular
            values, averaged over convolutions (`high_frequency_share`); 0 for no such penalty.

    Raises:
        UsageError: If an option is out of its range or has no effect, or the teacher has random weights or other
            classes.
    """

    teacher: Original | None = None

    precisions = ("32-true", "bf16-mixed", "16-mixed")

    def __init__(
        self,
        original: Original,
        optimizer: OptimizerCallable,
        scheduler: LRSchedulerCallable | None = None,
        label_smoothing: float = 0.0,
        teacher: Original | None = None,
        kd_weight: float = 0.0,
        temperature: float = 4.0,
        high_frequency_weight: float = 0.0,
    ) -> None:
        if not 0 <= label_smoothing < 1:
            raise UsageError(f"label_smoothing={label_smoothing}; expected a share of at least 0 and below 1.")
        require_at_least(0, kd_weight=kd_weight, high_frequency_weight=high_frequency_weight)
        require_positive(temperature=temperature)
        super().__init__(original)
        self.original = original
        self.kd_weight, self.temperature = kd_weight, temperature
        if teacher is not None:
            if not kd_weight:
                raise UsageError("a teacher is given, but kd_weight is 0; set it above 0, for example to 1.")
            self.set_constant("teacher", frozen_teacher(teacher, original))
        self.high_frequency_weight = high_frequency_weight
        self.convolutions = [module for module in original.modules() if isinstance(module, nn.Conv2d)]
        if high_frequency_weight and not self.convolutions:
            raise UsageError(
                f"high_frequency_weight={high_frequency_weight}, but {original.name!r} has no 2-D convolutions; "
                "leave it out."
            )
        self.optimizer, self.scheduler = optimizer, scheduler
        self.label_smoothing = label_smoothing

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Logits (B, C) for pixels in [0, 1]."""
        logits: Tensor = self.original(images_BCHW)
        return logits

    def loss_terms(self, batch: ImageBatch) -> dict[str, Tensor]:
        images_BCHW, labels_B = images_of(batch), labels_of(batch, self.num_classes)
        logits_BC = self(images_BCHW)
        terms = {"cross_entropy": cross_entropy(logits_BC, labels_B, label_smoothing=self.label_smoothing)}
        if self.teacher is not None:
            with torch.no_grad():
                teacher_BC = self.teacher(images_BCHW)
            terms["kd"] = self.kd_weight * kd_loss(logits_BC, teacher_BC, self.temperature)
        if self.high_frequency_weight:
            share = high_frequency_share(module.weight for module in self.convolutions)
            terms["high_frequency"] = self.high_frequency_weight * share
        return terms

    def setup(self, stage: str) -> None:
        if stage == "fit" and self.kd_weight and self.teacher is None:  # evaluations of such a fit need no teacher
            raise UsageError(
                f"kd_weight={self.kd_weight}, but there is no teacher; pass --model.teacher, or leave it out."
            )
        super().setup(stage)
        train_on = getattr(self._data, "train_on", "images")
        if stage == "fit" and train_on != "images":
            raise UsageError(f"--data.train_on {train_on}: OriginalModule is trained on labeled images; pass images.")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        if self.teacher is not None:
            checkpoint["teacher"] = self.teacher.fingerprint()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.original.weights_from = self.original.weights_from or "memory"
        if self._trainer is not None and self.trainer.state.fn == "fit":
            require_same_teacher(self.teacher, checkpoint)

    def trained_parameters(self) -> Iterable[Parameter]:
        return self.original.parameters()

    def needs_images(self, stage: str) -> bool:
        return stage != "predict"

    def on_train_end(self) -> None:
        super().on_train_end()
        self.original.weights_from = self.original.weights_from or "memory"

    @property
    def is_trained(self) -> bool:
        return self.original.weights_from is not None

    def optimizer_factories(self) -> tuple[OptimizerCallable, LRSchedulerCallable | None]:
        return self.optimizer, self.scheduler

    def classifiers(self, stage: str) -> dict[str, Callable[[Tensor], Tensor]]:
        if self._trainer is not None:
            take_class_names(self.original, self._data)
        return {"": self.original}

    def network(self) -> tuple[str, dict[str, Tensor]]:
        return self.original.name, {k: v.detach().clone() for k, v in self.original.net.state_dict().items()}
