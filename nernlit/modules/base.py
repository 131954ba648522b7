"""The contract of every LightningModule here.

`ClassifierModule` measures accuracy and makes optimisers; `ReconstructionModule` adds a representation. A scheme fills
one method, `loss_terms`. Batches are (pixels in [0, 1] of shape (B, C, H, W), labels (B,)); metrics are
`stage/quantity[_condition]`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import lightning as L
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters
from torch import Tensor
from torch.nn import Parameter
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy

from nernlit.errors import DataError, UsageError
from nernlit.losses import reconstruction_rmse, variance_explained
from nernlit.optimisers import NeedsTotalSteps
from nernlit.originals import Original
from nernlit.representation import Representation

ImageBatch = tuple[Tensor, Tensor]


class ClassifierModule(L.LightningModule, ABC):
    """Accuracy of one or more classifiers on the same images, and the optimiser's set-up.

    Args:
        original: Tells classes; also the network that `accuracies` compares with.
        optimizer: Makes the optimiser from parameters.
        scheduler: Makes the schedule from the optimiser; stepped once an optimiser step.
    """

    def __init__(
        self, original: Original, optimizer: OptimizerCallable, scheduler: LRSchedulerCallable | None = None
    ) -> None:
        super().__init__()
        # Under the command line these are the configuration's primitives. In a library call they would be whole
        # networks, which must not be pickled into checkpoints.
        if _given_hyperparameters.get() is not None:
            self.save_hyperparameters()
        self.make_optimizer, self.make_scheduler = optimizer, scheduler
        self.num_classes, self.in_chans = original.num_classes, original.in_chans
        self.metrics = torch.nn.ModuleDict()

    @abstractmethod
    def loss_terms(self, batch: ImageBatch) -> dict[str, Tensor]:
        """The scheme: its weighted loss terms by name. The step minimises their sum."""

    @abstractmethod
    def trained_parameters(self) -> Iterable[Parameter]:
        """What the optimiser moves."""

    @abstractmethod
    def classifiers(self) -> dict[str, Callable[[Tensor], Tensor]]:
        """What an evaluation measures: the suffix of its metrics' names -> pixels to logits."""

    @property
    @abstractmethod
    def is_trained(self) -> bool:
        """Whether an evaluation makes sense before a checkpoint is loaded."""

    @abstractmethod
    def network(self) -> tuple[str, dict[str, Tensor]]:
        """The network that the module stands for: its timm name and its state dict."""

    def setup(self, stage: str) -> None:
        data = getattr(self.trainer, "datamodule", None)
        classes = getattr(data, "num_classes", self.num_classes)
        if classes != self.num_classes:
            raise DataError(
                f"{type(data).__name__} has {classes} classes, but the original has {self.num_classes}; "
                "use the data it was trained on, or set its num_classes."
            )

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        terms = self.loss_terms(batch)
        loss = torch.stack(list(terms.values())).sum()
        self.log_dict({f"train/{name}": term.detach() for name, term in terms.items()})
        self.log("train/loss", loss.detach(), prog_bar=True)
        return loss

    def on_validation_epoch_start(self) -> None:
        self.start_evaluation("val")

    def on_test_epoch_start(self) -> None:
        self.start_evaluation("test")

    def validation_step(self, batch: ImageBatch, batch_idx: int) -> None:
        self._count(batch)

    def test_step(self, batch: ImageBatch, batch_idx: int) -> None:
        self._count(batch)

    def on_validation_epoch_end(self) -> None:
        self._report("val")

    def on_test_epoch_end(self) -> None:
        self._report("test")

    def predict_step(self, batch: Any, batch_idx: int) -> tuple[str, dict[str, Tensor]]:
        """The network's timm name and state dict, whatever the batch; the command line writes it to a file."""
        return self.network()

    def start_evaluation(self, stage: str) -> None:
        """Prepare the classifiers of this evaluation."""
        self._classifiers = self.classifiers()
        for suffix in self._classifiers:
            for name, top in (("acc", 1), ("acc_top5", min(5, self.num_classes))):
                if name + suffix not in self.metrics:
                    metric = MulticlassAccuracy(self.num_classes, top_k=top, average="micro")
                    self.metrics[name + suffix] = metric.to(self.device)

    def _count(self, batch: ImageBatch) -> None:
        images_BCHW, labels_B = batch
        if images_BCHW.shape[1] != self.in_chans:
            raise DataError(
                f"images of {images_BCHW.shape[1]} channels, but the original takes {self.in_chans}; "
                "use the data it was trained on, or set its in_chans."
            )
        for suffix, classify in self._classifiers.items():
            logits_BC = classify(images_BCHW)
            for name in ("acc", "acc_top5"):
                self._metric(name + suffix).update(logits_BC, labels_B)

    def _metric(self, name: str) -> Metric:
        metric = self.metrics[name]
        assert isinstance(metric, Metric)
        return metric

    def _report(self, stage: str) -> None:
        results = {}
        for suffix in self._classifiers:
            for name in (f"acc{suffix}", f"acc_top5{suffix}"):
                results[name] = self._metric(name).compute()
                self._metric(name).reset()
        self.log_results(stage, results)

    def log_results(self, stage: str, results: Mapping[str, Tensor]) -> None:
        """Log an evaluation's figures; equal on all processes already."""
        for name, value in results.items():
            self.log(f"{stage}/{name}", value, prog_bar=name == "acc", sync_dist=True)

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(list(self.trained_parameters()))
        scheduler = self.make_scheduler(optimizer) if self.make_scheduler else None
        made: list[object] = [optimizer, scheduler]
        planners = [thing for thing in made if isinstance(thing, NeedsTotalSteps)]
        if planners:
            steps = self.trainer.estimated_stepping_batches
            if steps == float("inf"):
                raise UsageError(
                    "the run has no end, so its schedule has none; pass --trainer.max_epochs or max_steps."
                )
            for thing in planners:
                thing.set_total_steps(int(steps))
        if scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class ReconstructionModule(ClassifierModule):
    """A module that trains a representation.

    Validation predicts all weights once and runs the original with them; the original itself is measured once a process
    and logged beside it.

    Args:
        representation: What is trained.
        optimizer: Makes the optimiser from the predictor's parameters.
        scheduler: Makes the schedule from the optimiser.
    """

    def __init__(
        self, representation: Representation, optimizer: OptimizerCallable, scheduler: LRSchedulerCallable | None = None
    ) -> None:
        super().__init__(representation.original, optimizer, scheduler)
        representation.original.require_weights()
        self.representation = representation
        self.seed = torch.initial_seed()
        self._original_results: dict[str, dict[str, Tensor]] = {}

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Logits (B, C) of the reconstructed CNN for pixels in [0, 1]."""
        logits: Tensor = self.representation(images_BCHW)
        return logits

    def trained_parameters(self) -> Iterable[Parameter]:
        return self.representation.predictor.parameters()

    @property
    def is_trained(self) -> bool:
        return False  # a new predictor is random

    def network(self) -> tuple[str, dict[str, Tensor]]:
        return self.representation.original.name, self.representation.reconstructed()

    def setup(self, stage: str) -> None:
        super().setup(stage)
        # Every process must draw from the same numbers, or their shares of a batch would overlap.
        self.seed = self.trainer.strategy.broadcast(self.seed)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["sampling_seed"] = self.seed

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.seed = checkpoint["sampling_seed"]

    def classifiers(self) -> dict[str, Callable[[Tensor], Tensor]]:
        weights = self.representation.weights()
        measured: dict[str, Callable[[Tensor], Tensor]] = {"": lambda images: self.representation(images, weights)}
        if self._stage not in self._original_results:
            measured["_original"] = self.representation.original
        return measured

    def start_evaluation(self, stage: str) -> None:
        self._stage = stage
        super().start_evaluation(stage)

    def log_results(self, stage: str, results: Mapping[str, Tensor]) -> None:
        everything = dict(results)
        of_original = {name: value for name, value in results.items() if name.endswith("_original")}
        # The sanity check before training sees a few images only: not a measurement to keep.
        if of_original and not self.trainer.sanity_checking:
            self._original_results[stage] = of_original
        everything |= self._original_results.get(stage, {})
        predicted, target = self.representation.kernels(), self.representation.target
        mask = self.representation.mask()
        everything["recon_rmse"] = reconstruction_rmse(predicted, target, mask)
        everything["variance_explained"] = variance_explained(predicted, target, mask)
        super().log_results(stage, everything)

    def on_fit_start(self) -> None:
        sizes = self.representation.sizes()
        if self.logger is not None and self.trainer.is_global_zero:
            figures = {"cr_paper": sizes.cr_paper, "cr_stored": sizes.cr_stored}
            figures["predictor_params"] = sizes.predictor_params
            self.logger.log_metrics({f"size/{name}": value for name, value in figures.items()}, step=0)
