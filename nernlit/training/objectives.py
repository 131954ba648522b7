"""Objectives map a training step to weighted loss terms by name, whose sum is minimized. Here: reconstruction.

Objectives do not depend on Lightning: everything that they need from the run is in the `Step`.

Shapes: N kernels, S of them sampled by this process, T predictors, K kernel side.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, final

import torch
from torch import Tensor

from nernlit.errors import DataError, require_one_of
from nernlit.kernels import Sampling, Uniform
from nernlit.losses import reconstruction_mse, reconstruction_rmse, root
from nernlit.originals import Original
from nernlit.predictors import PredictorEnsemble
from nernlit.representation import Representation
from nernlit.training.batches import images_of
from nernlit.training.filter_errors import FilterErrors
from nernlit.utilities.constants import WithConstants

ReconstructionLoss = Literal["mse", "rmse"]
NO_LABELS = "cross_entropy_weight needs labels, but noise has none; pass cross_entropy_weight 0."


@dataclass
class Step:
    """The inputs of an objective in one training step.

    Attributes:
        representation: The representation that is trained.
        batch: The batch of the datamodule: (pixels in [0, 1] of shape (B, C, H, W), labels (B,)), with the numbers (B,)
            of the training images if the module asks for them; ignored by objectives that need no images.
        target: Kernels to reconstruct, (N, K, K).
        norms: Euclidean norms of the target kernels, (N,), on the CPU.
        sizes: Number of weights of each kernel that are learned, (N,), on the CPU.
        error_weights: Weight of the squared error of each entry of the kernels, (N, K, K), with mean 1 over those that
            are weights of the network; None for equal ones.
        filter_errors: Measures the error of whole filters instead; steps then sample filters.
        ensemble: Predictors that are trained instead of the representation's own.
        number: Number of the batch, counted over the whole run.
        optimizer_step: Number of the optimizer step, counted over the whole run.
        seed: Seed of the run, equal on all processes.
        rank: Rank of this process.
        world_size: Number of processes.
        autocast: Returns the context of the precision of training steps.
        mean: Averages a scalar over all processes, with gradients.
        curve: Name of an additional metric for the error per predictor; None for none.
        metrics: Metrics to log as `train/<name>` in addition to the loss terms; objectives fill it.
        used_images: Whether the objective has called `images`.
    """

    representation: Representation
    batch: Any
    target: Tensor
    norms: Tensor
    sizes: Tensor
    error_weights: Tensor | None = None
    filter_errors: FilterErrors | None = None
    ensemble: PredictorEnsemble | None = None
    number: int = 0
    optimizer_step: int = 0
    seed: int = 0
    rank: int = 0
    world_size: int = 1
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
    mean: Callable[[Tensor], Tensor] = torch.positive
    curve: str | None = None
    metrics: dict[str, Tensor] = field(default_factory=dict)
    used_images: bool = False

    def images(self) -> Tensor:
        """The batch's images.

        Raises:
            DataError: If the batch does not consist of images and labels.
        """
        images_BCHW = images_of(self.batch)
        self.used_images = True
        return images_BCHW

    def numbers(self) -> Tensor:
        """The numbers (B,) of the batch's images among the training images.

        Raises:
            DataError: If the batch has none.
        """
        if len(self.batch) != 3:
            raise DataError("a training batch has no image numbers; expected (images, labels, numbers).")
        numbers_B: Tensor = self.batch[2]
        return numbers_B

    def kernels(self, rows_S: Tensor) -> Tensor:
        """Predicted kernels (T, S, K, K) of these rows of the kernel table, in weight units and with gradients."""
        representation = self.representation
        with self.autocast():
            if self.ensemble is None:
                return representation.kernels(rows_S)[None]
            kernels_TSKK: Tensor = self.ensemble(representation.addresses[rows_S])
        return kernels_TSKK.to(representation.scale.dtype) * representation.scale

    def all_weights(self) -> dict[str, Tensor]:
        """All predicted weights, and the kept tensors that are trained, with gradients."""
        with self.autocast():
            return self.representation.entries()


class Objective(WithConstants, ABC):
    """Maps a training step to weighted loss terms by name; their sum is minimized."""

    #: Whether the objective uses the batch's labels.
    needs_labels: bool = False

    #: Whether the objective uses the batch's images.
    needs_images: bool = False
    #: Whether the error of the predicted weights is a term, which `Step.error_weights` applies to.
    reconstructs: bool = False
    #: The teacher; None if it is the original.
    teacher: Original | None = None

    @abstractmethod
    def forward(self, step: Step) -> dict[str, Tensor]:
        """The loss terms of a step, each a scalar that is logged as `train/<name>`."""

    def reset(self) -> None:
        """Drop cached tensors of an earlier run's device or data; by default there are none."""


@final
class Reconstruction(Objective):
    """The reconstruction error of the sampled kernels, in units of the representation's scale.

    With several predictors (`Step.ensemble`) it is the sum of their errors, so that each has the same gradient as if
    trained alone. A predictor whose error is not finite is excluded, unless no error is finite.

    Args:
        sampling: Chooses the kernels of each step; uniform by default.
        loss: `mse`, or `rmse` as in NeRN's code.
    """

    reconstructs = True

    def __init__(self, sampling: Sampling | None = None, loss: ReconstructionLoss = "mse") -> None:
        super().__init__()
        self.sampling = sampling or Uniform()
        require_one_of(ReconstructionLoss, loss=loss)
        self.loss = loss

    def forward(self, step: Step) -> dict[str, Tensor]:
        # All processes draw the same sample and divide it among them.
        if step.filter_errors is None:
            shares = self.sampling.shares(step.norms, step.seed, step.number, step.world_size)
            joint, own = torch.cat(shares), shares[step.rank]
        else:
            samples = step.filter_errors.sample(self.sampling, step.norms, step.seed, step.number, step.world_size)
            rows_of = [step.filter_errors.rows(sample) for sample in samples]
            joint, own = torch.cat(rows_of), rows_of[step.rank]
        num_weights = max(1, int(step.sizes[joint].sum()))
        rows = own.to(step.target.device)
        predicted_TSKK = step.kernels(rows)
        scale, mask_SKK = step.representation.scale, step.representation.learned.mask(rows)
        target_SKK = step.target[rows] / scale
        # The mean over processes equals the mean over all sampled weights, even if the shares differ in size.
        share = num_weights / step.world_size

        def mse_of(predicted_TSKK: Tensor, weights_SKK: Tensor | None) -> Tensor:
            errors = [reconstruction_mse(kernels / scale, target_SKK, weights_SKK, share) for kernels in predicted_TSKK]
            return torch.stack(errors)

        if step.filter_errors is not None:
            kept_zeros = step.representation.learned.with_zeros  # have no error
            differences = [kept_zeros(kernels / scale - target_SKK, rows) for kernels in predicted_TSKK]
            # Times their number, because the mean over processes is to be the sum of their parts.
            mse_T = step.world_size * torch.stack(
                [step.filter_errors(each, samples[step.rank]) for each in differences]
            )
            plain_T = mse_of(predicted_TSKK.detach(), mask_SKK)
        elif step.error_weights is None:
            mse_T = mse_of(predicted_TSKK, mask_SKK)
            plain_T = mse_T.detach()
        else:
            mse_T = mse_of(predicted_TSKK, step.error_weights[rows])
            plain_T = mse_of(predicted_TSKK.detach(), mask_SKK)
        # The root of the mean over all processes, not the mean of the processes' roots.
        error_T = torch.stack([root(step.mean(mse)) for mse in mse_T]) if self.loss == "rmse" else mse_T
        kept: int | Tensor = len(error_T)
        if len(error_T) > 1:
            finite_T = error_T.isfinite()
            kept_T = finite_T | ~finite_T.any()
            kept = kept_T.sum()
            plain_T, error_T = torch.where(kept_T, plain_T, 0), torch.where(kept_T, error_T, 0)
        error = error_T.sum()
        power = float(step.norms[joint].double().square().sum()) / num_weights
        if power:  # of a pruned network, all sampled kernels may be zero
            step.metrics["explained_power"] = 1 - plain_T.sum() / kept * scale.square() / power
        if step.curve is not None:
            step.metrics[step.curve] = error.detach() / kept
        return {"recon": error}


def full_reconstruction_error(
    representation: Representation,
    weights: Mapping[str, Tensor],
    loss: ReconstructionLoss,
    error_weights: Tensor | None = None,
    filter_errors: FilterErrors | None = None,
) -> Tensor:
    """The error of all predicted weights, in units of the representation's scale.

    Args:
        representation: The representation.
        weights: State-dict key -> predicted weight.
        loss: `mse` or `rmse`.
        error_weights: See `Step`.
        filter_errors: See `Step`.
    """
    layout, scale = representation.layout, representation.scale
    if filter_errors is not None:
        targets = representation.original_weights()
        error = filter_errors.all({key: (weights[key] - target) / scale for key, target in targets.items()})
        return root(error) if loss == "rmse" else error
    predicted, target = layout.vector(weights) / scale, layout.vector(representation.original_weights()) / scale
    counted = representation.learned.nonzero if error_weights is None else error_weights  # kept zeros have no error
    of_errors = None if counted is None else layout.vector(layout.weights(counted))
    measure = reconstruction_rmse if loss == "rmse" else reconstruction_mse
    return measure(predicted, target, of_errors)
