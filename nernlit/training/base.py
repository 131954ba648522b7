"""The contract of every scheme: a module that trains a representation and fills one method, `loss_terms`."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from torch.nn import Parameter

from nernlit.kernels import Sampling
from nernlit.losses import explained_power, reconstruction_mse, reconstruction_rmse
from nernlit.representation import Representation
from nernlit.training.classifier import ClassifierModule
from nernlit.training.divergence import all_finite

ReconstructionLoss = Literal["mse", "rmse"]
Precision = Literal["fp32", "bf16"]


class Sample(NamedTuple):
    """The kernels of a training step.

    Attributes:
        rows: Those of this process, as rows of the kernel table.
        num_weights: Weights of those of all processes.
        energy: Sum of the squares of these weights' targets.
    """

    rows: Tensor
    num_weights: int
    energy: float


class ReconstructionModule(ClassifierModule):
    """A module that trains a representation.

    Validation predicts all weights once and runs the original with them; the original itself is measured once a process
    and logged beside it.

    Args:
        representation: What is trained.
        optimizer: Makes the optimizer from the predictor's parameters.
        scheduler: Makes the schedule from the optimizer.
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
        # Of every kernel: its norm, and how many weights it has.
        self.norms_N = representation.target.flatten(1).norm(dim=1).cpu()
        self.sizes_N = representation.layer_masks.sum((1, 2), dtype=torch.int16)[representation.addresses[:, 0]].cpu()

    def remember(self, rebuilt: Mapping[str, Any]) -> None:
        """Keep in this module's checkpoints how its representation, which came out of a file, is built again.

        Args:
            rebuilt: See `load_representation`.
        """
        if self.hparams:
            self.hparams.update(rebuilt)

    def sample(self, sampling: Sampling) -> Sample:
        """The kernels that this step looks at, shared out over the processes."""
        shares = sampling.shares(
            self.norms_N, self.seed, self.trainer.fit_loop.total_batch_idx, self.trainer.world_size
        )
        joint = torch.cat(shares)
        num_weights, energy = int(self.sizes_N[joint].sum()), float(self.norms_N[joint].double().square().sum())
        return Sample(shares[self.trainer.global_rank].to(self.device), num_weights, energy)

    def reconstruction_term(self, sampling: Sampling, loss: ReconstructionLoss) -> Tensor:
        """The reconstruction error of this step's kernels, in units of the representation's scale."""
        sample = self.sample(sampling)
        with self.autocast():
            predicted_NKK = self.representation.kernels(sample.rows)
        mse = self.sampled_mse(predicted_NKK, self.representation.target[sample.rows], sample)
        self.log_explained_power(mse, sample)
        return self.joined_root(mse) if loss == "rmse" else mse

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision of training steps."""
        if self.precision == "bf16":
            return torch.autocast(self.device.type, torch.bfloat16)
        return nullcontext()

    def sampled_mse(self, predicted_NKK: Tensor, target_NKK: Tensor, sample: Sample) -> Tensor:
        """The mean squared error of this process's share, in units of the representation's scale.

        The mean over processes is that of all sampled weights, however the shares differ in size.
        """
        scale, share = self.representation.scale, sample.num_weights / self.trainer.world_size
        mask_NKK = self.representation.mask(sample.rows)
        return reconstruction_mse(predicted_NKK / scale, target_NKK / scale, mask_NKK, share)

    def log_explained_power(self, mse: Tensor, sample: Sample) -> None:
        """Log what an error in units of the representation's scale leaves unexplained of the sampled weights."""
        power = sample.energy / sample.num_weights
        value = 1 - mse.detach() * self.representation.scale.square() / power
        self.log("train/explained_power", value, prog_bar=True, sync_dist=True)

    def joined_root(self, mse: Tensor) -> Tensor:
        """The root of the error of all processes: the mean of their roots is another number."""
        if self.trainer.world_size > 1:
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
        # Checkpoints and .nern files keep them.
        if classes := getattr(self._data, "classes", ()):
            self.representation.original.class_names = tuple(classes)
        # Of this run: the next one may have other images.
        self._original_results: dict[str, dict[str, Tensor]] = {}
        # Every process must draw from the same numbers, or their shares of a batch would overlap.
        self.seed = self.trainer.strategy.broadcast(self.seed)
        # Equal on all processes: DDP would send them, as large as the network, in every step.
        self._ddp_params_and_buffers_to_ignore = [name for name, _ in self.named_buffers()]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["sampling_seed"] = self.seed

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.seed = checkpoint["sampling_seed"]

    def predicted_networks(self) -> dict[str, dict[str, Tensor]]:
        """What an evaluation measures: the suffix of its metrics' names -> predicted weights."""
        return {"": self.representation.weights()}

    def classifiers(self) -> dict[str, Callable[[Tensor], Tensor]]:
        self._networks = self.predicted_networks()
        self.finite = {suffix: all_finite(weights.values()) for suffix, weights in self._networks.items()}
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
        everything["explained_power"] = explained_power(*pair)
        del self._networks  # as large as the network
        super().log_results(stage, everything)

    def on_fit_start(self) -> None:
        super().on_fit_start()
        sizes = self.representation.sizes()
        if self.logger is not None and self.trainer.is_global_zero:
            figures = {"cr_paper": sizes.cr_paper, "cr_stored": sizes.cr_stored}
            figures["predictor_params"] = sizes.predictor_params
            self.logger.log_metrics({f"size/{name}": value for name, value in figures.items()}, step=0)
