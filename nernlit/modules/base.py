"""The contract of every scheme: a module that trains a representation and fills one method, `loss_terms`."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from torch.nn import Parameter

from nernlit.kernels import Sampling
from nernlit.losses import reconstruction_mse, reconstruction_rmse, variance_explained
from nernlit.modules.classifier import ClassifierModule
from nernlit.representation import Representation

ReconstructionLoss = Literal["mse", "rmse"]
Precision = Literal["fp32", "bf16"]


class ReconstructionModule(ClassifierModule):
    """A module that trains a representation.

    Validation predicts all weights once and runs the original with them; the original itself is measured once a process
    and logged beside it.

    Args:
        representation: What is trained.
        optimizer: Makes the optimiser from the predictor's parameters.
        scheduler: Makes the schedule from the optimiser.
        precision: Of the predictor, and of the CNNs, in training steps: `bf16` runs them under autocast. Parameters,
            losses and every evaluation stay in fp32.
    """

    def __init__(
        self,
        representation: Representation,
        optimizer: OptimizerCallable,
        scheduler: LRSchedulerCallable | None = None,
        precision: Precision = "fp32",
    ) -> None:
        super().__init__(representation.original, optimizer, scheduler)
        self.precision = precision
        representation.original.require_weights()
        self.representation = representation
        self.seed = torch.initial_seed()
        self.norms_N = representation.target.flatten(1).norm(dim=1).cpu()

    def remember(self, described: Mapping[str, Any] | None) -> None:
        """Keep in this module's checkpoints how a representation that came out of another checkpoint is built.

        They then stand alone: the other file is not needed again.
        """
        if described is not None and self.hparams:
            self.hparams.update(representation=dict(described), init_from=None)

    def sampled_rows(self, sampling: Sampling, shared: bool = False) -> Tensor:
        """The rows of the kernel table that this step looks at: this process's share, or the same ones on all."""
        place = (0, 1) if shared else (self.trainer.global_rank, self.trainer.world_size)
        return sampling.indices(self.norms_N, self.seed, self.trainer.fit_loop.total_batch_idx, *place).to(self.device)

    def reconstruction_term(self, rows: Tensor, loss: ReconstructionLoss) -> Tensor:
        """The reconstruction error of these rows, in units of the representation's scale."""
        with self.autocast():
            predicted_NKK = self.representation.kernels(rows)
        target_NKK, mask_NKK = self.representation.target[rows], self.representation.mask(rows)
        return self.sampled_error(predicted_NKK, target_NKK, mask_NKK, loss)

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision of training steps."""
        if self.precision == "bf16":
            return torch.autocast(self.device.type, torch.bfloat16)
        return nullcontext()

    def sampled_error(
        self, predicted_NKK: Tensor, target_NKK: Tensor, mask_NKK: Tensor | None, loss: ReconstructionLoss
    ) -> Tensor:
        """The error of sampled kernels in units of the representation's scale, joined over processes."""
        scale = self.representation.scale
        mse = reconstruction_mse(predicted_NKK / scale, target_NKK / scale, mask_NKK)
        power = reconstruction_mse(torch.zeros_like(target_NKK), target_NKK / scale, mask_NKK)
        self.log("train/variance_explained", 1 - mse.detach() / power, prog_bar=True)
        if loss == "mse":
            return mse
        if self.trainer.world_size > 1:
            # The mean of the processes' roots is not the root of their mean.
            gathered = self.all_gather(mse, sync_grads=True)
            assert isinstance(gathered, Tensor)
            mse = gathered.mean()
        return mse.sqrt()

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
        # Of this run: the next one may have other images.
        self._original_results: dict[str, dict[str, Tensor]] = {}
        # Every process must draw from the same numbers, or their shares of a batch would overlap.
        self.seed = self.trainer.strategy.broadcast(self.seed)
        # Equal on all processes: DDP would send them, as large as the network, in every step.
        self._ddp_params_and_buffers_to_ignore = [name for name, _ in self.named_buffers()]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["sampling_seed"] = self.seed

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.seed = checkpoint["sampling_seed"]

    def predicted_networks(self) -> dict[str, dict[str, Tensor]]:
        """What an evaluation measures: the suffix of its metrics' names -> predicted weights."""
        return {"": self.representation.weights()}

    def classifiers(self) -> dict[str, Callable[[Tensor], Tensor]]:
        self._networks = self.predicted_networks()
        measured: dict[str, Callable[[Tensor], Tensor]] = {
            suffix: partial(self.representation, weights=weights) for suffix, weights in self._networks.items()
        }
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
        layout = self.representation.layout
        pair = layout.vector(self._networks[""]), layout.vector(self.representation.original_weights())
        everything["recon_rmse"] = reconstruction_rmse(*pair)
        everything["variance_explained"] = variance_explained(*pair)
        del self._networks  # as large as the network
        super().log_results(stage, everything)

    def on_fit_start(self) -> None:
        sizes = self.representation.sizes()
        if self.logger is not None and self.trainer.is_global_zero:
            figures = {"cr_paper": sizes.cr_paper, "cr_stored": sizes.cr_stored}
            figures["predictor_params"] = sizes.predictor_params
            self.logger.log_metrics({f"size/{name}": value for name, value in figures.items()}, step=0)
