"""Baseline-joint (NeRN, arXiv 2212.13554; arXiv 2407.00356, eq. 1): reconstruction and distillation at once.

L = L_recon + alpha * L_FMD + beta * L_KD, with alpha = `feature_weight` and beta = `kd_weight`. Every option's default
is NeRN's for CIFAR-10.
"""

from collections.abc import Sequence
from typing import Any, Literal, final

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from nernlit.errors import UsageError, require_at_least, require_positive
from nernlit.kernels import MagnitudeMix, Sampling
from nernlit.losses import reconstruction_rmse
from nernlit.originals import NERN_TAPS, Original
from nernlit.representation import Representation
from nernlit.training.base import Precision
from nernlit.training.classifier import ImageBatch
from nernlit.training.distilling import DistillingModule
from nernlit.training.plan import Plan


@final
class BaselineJoint(DistillingModule):
    """All terms of eq. 1 in every step, L_recon in weight units.

    The whole network is predicted for the forward pass; with `gradients: sampled` only the sampled kernels carry
    gradients, from all terms. Several processes share the kernels of a step and split its images.

    Args:
        representation: What is trained.
        optimizer: Makes the optimizer from the predictor's parameters.
        scheduler: Makes the schedule from the optimizer.
        sampling: Which kernels carry gradients.
        gradients: `sampled` (NeRN's), or `all` (ours): every kernel carries gradients.
        warmup_steps: Steps of Recon-only before images are looked at.
        recon_weight: Of the root mean squared reconstruction error.
        feature_weight: alpha, of the feature maps' distance to the original's.
        kd_weight: beta, of the divergence from the teacher.
        kd_inside_log: Added to probabilities inside that divergence's logarithms.
        temperature: Of both softmaxes.
        teacher: Whose logits are learned: any classifier of the same classes; the original by default.
        taps: Modules whose feature maps are compared; see `FeatureTaps`.
        precision: Of the predictor and the CNNs in training steps, `bf16` or `fp32`.
    """

    def __init__(
        self,
        representation: Representation,
        optimizer: OptimizerCallable,
        scheduler: LRSchedulerCallable | None = None,
        sampling: Sampling | None = None,
        gradients: Literal["sampled", "all"] = "sampled",
        warmup_steps: int = 0,
        recon_weight: float = 1.0,
        feature_weight: float = 1e-4,
        kd_weight: float = 1e-4,
        kd_inside_log: float = 1e-4,
        temperature: float = 1.0,
        teacher: Original | None = None,
        taps: Sequence[str] = NERN_TAPS,
        precision: Precision = "fp32",
    ) -> None:
        require_at_least(0, warmup_steps=warmup_steps, recon_weight=recon_weight, feature_weight=feature_weight)
        require_at_least(0, kd_weight=kd_weight, kd_inside_log=kd_inside_log)
        require_positive(temperature=temperature)
        if not recon_weight and (not (kd_weight or feature_weight) or warmup_steps):
            raise UsageError(
                f"recon_weight=0, feature_weight={feature_weight}, kd_weight={kd_weight}, warmup_steps={warmup_steps}: "
                "some step has nothing to learn; give a term of it a weight."
            )
        super().__init__(representation, optimizer, scheduler, teacher, taps, precision)
        self.sampling = sampling or MagnitudeMix()
        self.gradients = gradients
        self.warmup_steps = warmup_steps
        self.recon_weight, self.feature_weight, self.kd_weight = recon_weight, feature_weight, kd_weight
        self.kd_options = {"temperature": temperature, "inside_log": kd_inside_log}

    @classmethod
    def check_plan(cls, plan: Plan, options: Any) -> None:
        if (options.feature_weight or options.kd_weight) and options.warmup_steps >= plan.most_steps:
            raise UsageError(
                f"the run ends after {plan.most_steps:.0f} steps, within the loss warm-up (warmup_steps="
                f"{options.warmup_steps}), and would never look at an image; make it longer (--trainer.max_epochs) or "
                "the warm-up shorter."
            )

    @property
    def stage(self) -> int:
        """0 while only kernels are looked at, 1 when images are."""
        warming_up = self.trainer.global_step < self.warmup_steps
        return int(not warming_up and bool(self.feature_weight or self.kd_weight))

    def loss_terms(self, batch: ImageBatch) -> dict[str, Tensor]:
        if self.stage == 0:
            in_units_of_scale = self.reconstruction_term(self.sampling, "rmse")
            return {"recon": self.recon_weight * self.representation.scale * in_units_of_scale}
        weights = self._weights()
        terms, _ = self.student_terms(batch, weights, self.kd_weight, self.feature_weight, **self.kd_options)
        if self.recon_weight:
            layout = self.representation.layout
            target = layout.vector(self.representation.original_weights())
            terms["recon"] = self.recon_weight * reconstruction_rmse(layout.vector(weights), target)
        return terms

    def _weights(self) -> dict[str, Tensor]:
        """All predicted weights, those of the kernels that this step samples with gradients."""
        if self.gradients == "all":
            with self.autocast():
                return self.representation.weights()
        # Two contexts: one remembers the parameters as it converted them, here without gradients.
        with self.autocast(), torch.no_grad():
            weights = self.representation.weights()
        # The same kernels on all processes; drawn twice, a kernel still is one.
        drawn = self.sampling.indices(self.norms_N, self.seed, self.trainer.fit_loop.total_batch_idx)
        rows = drawn.unique().to(self.device)
        with self.autocast():
            sampled_SKK = self.representation.kernels(rows)
        return self.representation.layout.with_kernels(weights, rows, sampled_SKK)
