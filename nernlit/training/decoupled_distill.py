"""Decoupled-distill (arXiv 2407.00356, section 3.3): reconstruction first, then distillation alone.

Phase 1 is Recon-only. Phase 2 starts from its predictor and matches the reconstructed CNN's logits to a teacher's; the
gradient flows through every predicted kernel, and the original's weights no longer appear in the loss.
"""

from collections.abc import Sequence
from typing import Any, final

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from torch.nn.functional import cross_entropy

from nernlit.errors import UsageError, require_at_least, require_positive
from nernlit.kernels import Sampling, Uniform
from nernlit.losses import reconstruction_mse
from nernlit.originals import NERN_TAPS, Original
from nernlit.representation import Representation, load_representation
from nernlit.training.base import Precision, ReconstructionLoss
from nernlit.training.classifier import ImageBatch
from nernlit.training.distilling import DistillingModule
from nernlit.training.plan import Plan
from nernlit.training.stages import StagedModule


@final
class DecoupledDistill(StagedModule, DistillingModule):
    """Phase 1: `recon_steps` of Recon-only, or none and `init_from`. Phase 2: distillation to the end of the run.

    Args:
        representation: What is trained. None takes the one of `init_from` as it is.
        optimizer: Makes phase 2's optimizer from the predictor's parameters.
        scheduler: Makes phase 2's schedule from its optimizer.
        init_from: Checkpoint of an earlier fit whose predictor phase 1, or phase 2, starts from. Where a
            representation is given too, the checkpoint must fit it.
        teacher: Whose logits are learned: any classifier of the same classes; the original by default.
        kd_weight: Of the divergence from the teacher.
        temperature: Of both softmaxes.
        cross_entropy_weight: Of the cross-entropy with the labels.
        recon_weight: Of the mean squared reconstruction error, in units of the representation's scale.
        feature_weight: Of the feature maps' distance to the original's.
        taps: Modules whose feature maps are compared; see `FeatureTaps`.
        precision: Of the predictor and the CNNs in training steps, `bf16` or `fp32`.
        recon_steps: Optimizer steps of phase 1.
        recon_optimizer: Makes phase 1's optimizer; phase 2's by default.
        recon_scheduler: Makes phase 1's schedule.
        recon_sampling: Which kernels a step of phase 1 looks at; uniform by default.
        recon_loss: Of phase 1: `mse` or `rmse`.
    """

    def __init__(
        self,
        representation: Representation | None = None,
        *,
        optimizer: OptimizerCallable,
        scheduler: LRSchedulerCallable | None = None,
        init_from: str | None = None,
        teacher: Original | None = None,
        kd_weight: float = 1.0,
        temperature: float = 1.0,
        cross_entropy_weight: float = 0.0,
        recon_weight: float = 0.0,
        feature_weight: float = 0.0,
        taps: Sequence[str] = NERN_TAPS,
        precision: Precision = "bf16",
        recon_steps: int = 0,
        recon_optimizer: OptimizerCallable | None = None,
        recon_scheduler: LRSchedulerCallable | None = None,
        recon_sampling: Sampling | None = None,
        recon_loss: ReconstructionLoss = "mse",
    ) -> None:
        require_at_least(0, kd_weight=kd_weight, cross_entropy_weight=cross_entropy_weight, recon_weight=recon_weight)
        require_at_least(0, feature_weight=feature_weight, recon_steps=recon_steps)
        require_positive(temperature=temperature)
        if not kd_weight and not cross_entropy_weight and not feature_weight:
            raise UsageError("kd_weight, cross_entropy_weight and feature_weight are all 0; nothing is left to learn.")
        representation, described = load_representation(init_from, representation)
        super().__init__(representation, optimizer, scheduler, teacher, taps, precision)
        self.remember(described)
        self.kd_weight, self.temperature = kd_weight, temperature
        self.cross_entropy_weight, self.feature_weight = cross_entropy_weight, feature_weight
        self.recon_weight = recon_weight
        self.has_phase_1 = bool(init_from or recon_steps)
        self.recon_steps, self.recon_loss = recon_steps, recon_loss
        self.recon_sampling = recon_sampling or Uniform()
        self.make_recon_optimizer, self.make_recon_scheduler = recon_optimizer or optimizer, recon_scheduler

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.has_phase_1 = True

    def on_fit_start(self) -> None:
        if not self.has_phase_1:
            raise UsageError(
                "Decoupled-distill has no phase 1: pass --model.init_from CHECKPOINT, or --model.recon_steps N."
            )
        super().on_fit_start()

    def stage_starts(self) -> Sequence[int]:
        return [self.recon_steps] if self.recon_steps else []

    @classmethod
    def check_plan(cls, plan: Plan, options: Any) -> None:
        if plan.most_steps <= options.recon_steps:
            raise UsageError(
                f"the run ends after {plan.most_steps:.0f} steps, within phase 1 (recon_steps={options.recon_steps}); "
                "pass a larger --trainer.max_epochs, or fewer --model.recon_steps."
            )

    def makers(self) -> tuple[OptimizerCallable, LRSchedulerCallable | None]:
        return (self.make_recon_optimizer, self.make_recon_scheduler) if self.reconstructs else super().makers()

    @property
    def reconstructs(self) -> bool:
        """Whether this is phase 1."""
        return bool(self.recon_steps) and self.stage == 0

    def loss_terms(self, batch: ImageBatch) -> dict[str, Tensor]:
        if self.reconstructs:
            return {"recon": self.reconstruction_term(self.recon_sampling, self.recon_loss)}
        representation = self.representation
        with self.autocast():
            weights = representation.weights()
        terms, logits_BC = self.student_terms(
            batch, weights, self.kd_weight, self.feature_weight, temperature=self.temperature
        )
        if self.cross_entropy_weight:
            terms["cross_entropy"] = self.cross_entropy_weight * cross_entropy(logits_BC, _labels(batch))
        if self.recon_weight:
            layout, scale = representation.layout, representation.scale
            target = layout.vector(representation.original_weights())
            terms["recon"] = self.recon_weight * reconstruction_mse(layout.vector(weights) / scale, target / scale)
        return terms


def _labels(batch: ImageBatch) -> Tensor:
    if bool((batch[1] < 0).any()):
        raise UsageError("cross_entropy_weight needs labels, which noise has none of; pass cross_entropy_weight 0.")
    return batch[1]
