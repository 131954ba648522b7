"""Training of an original, for users who do not have a checkpoint."""

from collections.abc import Callable, Iterable
from typing import final

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from torch.nn import Parameter
from torch.nn.functional import cross_entropy

from nernlit.errors import UsageError
from nernlit.originals import Original
from nernlit.training.classifier import ClassifierModule
from nernlit.training.evaluation import ImageBatch


@final
class OriginalModule(ClassifierModule):
    """Trains a CNN with cross-entropy on labeled images.

    Its checkpoints, and the files that `predict` writes, can be used as an original's `checkpoint`.

    Args:
        original: The CNN to train, from random weights or from its checkpoint.
        optimizer: Creates the optimizer from the CNN's parameters.
        scheduler: Creates the learning-rate schedule from the optimizer.
        label_smoothing: Probability mass that is distributed over all classes, at least 0 and below 1.
    """

    precisions = ("32-true", "bf16-mixed", "16-mixed")

    def __init__(
        self,
        original: Original,
        optimizer: OptimizerCallable,
        scheduler: LRSchedulerCallable | None = None,
        label_smoothing: float = 0.0,
    ) -> None:
        if not 0 <= label_smoothing < 1:
            raise UsageError(f"label_smoothing={label_smoothing}; expected a share of at least 0 and below 1.")
        super().__init__(original)
        self.original = original
        self.optimizer, self.scheduler = optimizer, scheduler
        self.label_smoothing = label_smoothing

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Logits (B, C) for pixels in [0, 1]."""
        logits: Tensor = self.original(images_BCHW)
        return logits

    def loss_terms(self, batch: ImageBatch) -> dict[str, Tensor]:
        images_BCHW, labels_B = batch
        return {"cross_entropy": cross_entropy(self(images_BCHW), labels_B, label_smoothing=self.label_smoothing)}

    def trained_parameters(self) -> Iterable[Parameter]:
        return self.original.parameters()

    def needs_images(self, stage: str) -> bool:
        return stage != "predict"

    @property
    def is_trained(self) -> bool:
        return self.original.weights_from is not None

    def makers(self) -> tuple[OptimizerCallable, LRSchedulerCallable | None]:
        return self.optimizer, self.scheduler

    def classifiers(self, stage: str) -> dict[str, Callable[[Tensor], Tensor]]:
        return {"": self.original}

    def network(self) -> tuple[str, dict[str, Tensor]]:
        return self.original.name, {k: v.detach().clone() for k, v in self.original.net.state_dict().items()}
