"""The contract of every scheme: a module that trains a representation and fills one method, `loss_terms`."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from torch.nn import Parameter

from nernlit.losses import reconstruction_rmse, variance_explained
from nernlit.modules.classifier import ClassifierModule
from nernlit.representation import Representation


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
        self._predicted_NKK = self.representation.kernels()
        weights = self.representation.layout.weights(self._predicted_NKK)
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
        pair = self._predicted_NKK, self.representation.target
        mask = self.representation.mask()
        everything["recon_rmse"] = reconstruction_rmse(*pair, mask)
        everything["variance_explained"] = variance_explained(*pair, mask)
        del self._predicted_NKK  # as large as the network
        super().log_results(stage, everything)

    def on_fit_start(self) -> None:
        sizes = self.representation.sizes()
        if self.logger is not None and self.trainer.is_global_zero:
            figures = {"cr_paper": sizes.cr_paper, "cr_stored": sizes.cr_stored}
            figures["predictor_params"] = sizes.predictor_params
            self.logger.log_metrics({f"size/{name}": value for name, value in figures.items()}, step=0)
