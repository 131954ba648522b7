"""Decoupled-distill (arXiv 2407.00356, section 3.3): reconstruction first, then distillation alone.

Phase 1 is Recon-only. Phase 2 starts from its predictor and matches the reconstructed CNN's logits to a teacher's; the
gradient flows through every predicted kernel, and the original's weights no longer appear in the loss.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable

from nernlit.errors import UsageError, require_at_least
from nernlit.kernels import Sampling
from nernlit.originals import NERN_TAPS, Original
from nernlit.representation import Representation, load_representation
from nernlit.training.objectives import Distillation, Reconstruction, ReconstructionLoss
from nernlit.training.plan import Plan
from nernlit.training.scheme import Precision, Scheme
from nernlit.training.stages import Stage


@dataclass(frozen=True)
class ReconstructionPhase:
    """Phase 1: Recon-only, with its options.

    Args:
        steps: Optimizer steps; 0 leaves the phase out.
        optimizer: Makes its optimizer from the predictor's parameters; phase 2's by default.
        scheduler: Makes its schedule from the optimizer.
        sampling: Which kernels a step looks at; uniform by default.
        loss: `mse` or `rmse`.
    """

    steps: int = 0
    optimizer: OptimizerCallable | None = None
    scheduler: LRSchedulerCallable | None = None
    sampling: Sampling | None = None
    loss: ReconstructionLoss = "mse"


@final
class DecoupledDistill(Scheme):
    """Two stages: reconstruction (or `init_from`), then distillation to the end of the run.

    Args:
        representation: What is trained. None takes the one of `init_from` as it is.
        optimizer: Makes phase 2's optimizer from the predictor's parameters.
        scheduler: Makes phase 2's schedule from its optimizer.
        reconstruction: Phase 1.
        init_from: A file of an earlier fit whose predictor phase 1, or phase 2, starts from. Where a representation is
            given too, the file must fit it.
        teacher: Whose logits are learned: any classifier of the same classes; the original by default.
        kd_weight: Of the divergence from the teacher.
        temperature: Of both softmaxes.
        cross_entropy_weight: Of the cross-entropy with the labels.
        recon_weight: Of the mean squared reconstruction error in phase 2, in units of the representation's scale.
        feature_weight: Of the feature maps' distance to the original's.
        taps: Modules whose feature maps are compared; see `FeatureTaps`.
        precision: Of the predictor and the CNNs in training steps, `bf16` or `fp32`.
    """

    def __init__(
        self,
        representation: Representation | None = None,
        *,
        optimizer: OptimizerCallable,
        scheduler: LRSchedulerCallable | None = None,
        reconstruction: ReconstructionPhase = ReconstructionPhase(),
        init_from: str | None = None,
        teacher: Original | None = None,
        kd_weight: float = 1.0,
        temperature: float = 1.0,
        cross_entropy_weight: float = 0.0,
        recon_weight: float = 0.0,
        feature_weight: float = 0.0,
        taps: Sequence[str] = NERN_TAPS,
        precision: Precision = "bf16",
    ) -> None:
        require_at_least(0, **{"reconstruction.steps": reconstruction.steps})
        representation, rebuilt = load_representation(init_from, representation)
        distillation = Distillation(
            representation.original,
            teacher,
            kd_weight=kd_weight,
            temperature=temperature,
            feature_weight=feature_weight,
            cross_entropy_weight=cross_entropy_weight,
            recon_weight=recon_weight,
            taps=taps,
        )
        if not kd_weight and not cross_entropy_weight and not feature_weight:
            raise UsageError("kd_weight, cross_entropy_weight and feature_weight are all 0; nothing is left to learn.")
        phase_1 = Stage(
            Reconstruction(reconstruction.sampling, reconstruction.loss),
            reconstruction.optimizer or optimizer,
            reconstruction.scheduler,
            reconstruction.steps,
        )
        phase_2 = Stage(distillation, optimizer, scheduler)
        stages = [phase_1, phase_2] if reconstruction.steps else [phase_2]
        super().__init__(representation, stages, precision, rebuilt)
        self.has_phase_1 = bool(init_from or reconstruction.steps)
        self.reconstruction = reconstruction

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.has_phase_1 = True

    def on_fit_start(self) -> None:
        if not self.has_phase_1:
            raise UsageError(
                "Decoupled-distill has no phase 1: pass --model.init_from FILE, or --model.reconstruction.steps N."
            )
        super().on_fit_start()

    @classmethod
    def check_plan(cls, plan: Plan, options: Any) -> None:
        steps = options.reconstruction.steps
        if plan.most_steps <= steps:
            raise UsageError(
                f"the run ends after {plan.most_steps:.0f} steps, within phase 1 (reconstruction.steps={steps}); "
                "pass a larger --trainer.max_epochs, or fewer --model.reconstruction.steps."
            )
