"""Baseline-joint (NeRN, arXiv 2212.13554; arXiv 2407.00356, eq. 1): reconstruction and distillation in every step.

L = L_recon + alpha * L_FMD + beta * L_KD, with alpha = `feature_weight` and beta = `kd_weight`. Every option's default
is NeRN's for CIFAR-10.
"""

from collections.abc import Sequence
from typing import Any, Literal, final

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from nernlit.errors import UsageError, require_at_least, require_one_of
from nernlit.kernels import MagnitudeMix, Sampling
from nernlit.originals import NERN_TAPS, Original
from nernlit.representation import Representation
from nernlit.training.distillation import Distillation
from nernlit.training.objectives import Objective, Reconstruction, Step, full_reconstruction_error
from nernlit.training.plan import Plan
from nernlit.training.rate import Rate
from nernlit.training.recovery import OnDivergence
from nernlit.training.scheme import Precision, Scheme
from nernlit.training.sensitivity import NO_SENSITIVITY, Sensitivity
from nernlit.training.stages import Stage

Gradients = Literal["sampled", "all"]


@final
class JointObjective(Objective):
    """All terms of eq. 1 in one step, L_recon in weight units.

    Args:
        reconstruction: The only term during the warm-up; its sampling chooses the kernels that gradients flow to.
        distillation: L_FMD and L_KD.
        recon_weight: Weight of L_recon, a root-mean-square error.
        warmup_steps: Optimizer steps of reconstruction before images are used.
        gradients: `sampled`: gradients of all terms flow to the sampled kernels only; `all`: to all kernels.
    """

    def __init__(
        self,
        reconstruction: Reconstruction,
        distillation: Distillation,
        recon_weight: float,
        warmup_steps: int,
        gradients: Gradients,
    ) -> None:
        super().__init__()
        require_one_of(Gradients, gradients=gradients)
        self.reconstruction, self.distillation = reconstruction, distillation
        self.recon_weight, self.warmup_steps, self.gradients = recon_weight, warmup_steps, gradients
        self.reconstructs = recon_weight > 0
        self.needs_images = bool(distillation.kd_weight or distillation.feature_weight)

    @property
    def teacher(self) -> Original | None:  # type: ignore[override]
        return self.distillation.teacher

    def reset(self) -> None:
        self.distillation.reset()

    def forward(self, step: Step) -> dict[str, Tensor]:
        recon_weight = self.recon_weight * step.representation.scale
        if step.optimizer_step < self.warmup_steps or not self.needs_images:
            return {"recon": recon_weight * self.reconstruction(step)["recon"]}
        weights = self._weights(step)
        terms = self.distillation.terms(step, weights)
        if self.recon_weight:
            measures = step.error_weights, step.filter_errors
            error = full_reconstruction_error(step.representation, weights, "rmse", *measures)
            terms["recon"] = recon_weight * error
        return terms

    def _weights(self, step: Step) -> dict[str, Tensor]:
        """All entries; gradients flow to the kernels that this step samples, and to the trained kept tensors."""
        if self.gradients == "all":
            return step.all_weights()
        # Two autocast contexts: each caches converted parameters, here without gradients.
        with torch.no_grad():
            weights = step.all_weights()
        # The same kernels on all processes; a kernel that is drawn twice counts once.
        shares = self.reconstruction.sampling.shares(step.norms, step.seed, step.number, step.world_size)
        rows = torch.cat(shares).unique().to(step.target.device)
        (sampled_SKK,) = step.kernels(rows)
        return {**weights, **step.representation.layout.with_kernels(weights, rows, sampled_SKK)}


@final
class BaselineJoint(Scheme):
    """One stage with two objectives.

    Each of several processes computes gradients of all kernels of a step, on its share of the images.

    Args:
        representation: The representation to train.
        optimizer: Creates the optimizer from the predictor's parameters.
        scheduler: Creates the learning-rate schedule from the optimizer.
        sampling: Chooses the kernels that gradients flow to in each step; with `gradients: all` those of the warm-up.
        gradients: `sampled` (as in NeRN): gradients flow to the sampled kernels only; `all`: to all kernels.
        warmup_steps: Steps of Recon-only before images are used.
        recon_weight: Weight of the root-mean-square reconstruction error.
        feature_weight: alpha, the weight of the feature-map loss against the original.
        kd_weight: beta, the weight of the KL divergence from the teacher.
        kd_inside_log: Added to the probabilities inside the divergence's logarithms.
        temperature: Softmax temperature of student and teacher in the KL divergence.
        teacher: The classifier whose logits are learned, with the same classes; the original by default.
        taps: Modules whose feature maps are compared with `feature_weight` above 0; see `FeatureTaps`.
        precision: Precision of the predictor and the CNNs in training steps, `bf16` or `fp32`.
        rate: The price of bits in the loss, for a quantized representation.
        sensitivity: How much the error of each weight counts in the reconstruction error.
        on_divergence: `stop`, or `restart` from the last good state with half the learning rate; see `Scheme`.
    """

    def __init__(
        self,
        representation: Representation,
        optimizer: OptimizerCallable,
        scheduler: LRSchedulerCallable | None = None,
        sampling: Sampling | None = None,
        gradients: Gradients = "sampled",
        warmup_steps: int = 0,
        recon_weight: float = 1.0,
        feature_weight: float = 1e-4,
        kd_weight: float = 1e-4,
        kd_inside_log: float = 1e-4,
        temperature: float = 1.0,
        teacher: Original | None = None,
        taps: Sequence[str] = NERN_TAPS,
        precision: Precision = "fp32",
        rate: Rate | None = None,
        sensitivity: Sensitivity = NO_SENSITIVITY,
        on_divergence: OnDivergence = "stop",
    ) -> None:
        require_at_least(0, warmup_steps=warmup_steps, recon_weight=recon_weight)
        distillation = Distillation(
            representation.original,
            teacher,
            kd_weight=kd_weight,
            temperature=temperature,
            kd_inside_log=kd_inside_log,
            feature_weight=feature_weight,
            taps=taps,
        )
        if not recon_weight and (not (kd_weight or feature_weight) or warmup_steps):
            raise UsageError(
                f"recon_weight=0, feature_weight={feature_weight}, kd_weight={kd_weight}, warmup_steps={warmup_steps}: "
                "some steps have nothing to learn; set one of the weights above 0."
            )
        reconstruction = Reconstruction(sampling or MagnitudeMix(), "rmse")
        objective = JointObjective(reconstruction, distillation, recon_weight, warmup_steps, gradients)
        stage = Stage(objective, optimizer, scheduler)
        super().__init__(representation, [stage], precision, None, rate, sensitivity, on_divergence)
        self.warmup_steps, self.feature_weight, self.kd_weight = warmup_steps, feature_weight, kd_weight

    @classmethod
    def check_plan(cls, plan: Plan, options: Any) -> None:
        uses_images = options.feature_weight or options.kd_weight
        if uses_images and options.warmup_steps >= plan.most_steps and not plan.is_trial:
            raise UsageError(
                f"the run ends after {plan.most_steps:.0f} steps, within the loss warm-up (warmup_steps="
                f"{options.warmup_steps}), and would never use an image; pass a larger --trainer.max_epochs or "
                "fewer --model.warmup_steps."
            )
