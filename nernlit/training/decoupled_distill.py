"""Decoupled-distill (arXiv 2407.00356, section 3.2): reconstruction first, then distillation alone.

Phase 1 is Recon-only. Phase 2 starts from its predictor and matches the reconstructed CNN's logits to a teacher's; the
gradient flows through every predicted kernel, and the original's weights no longer appear in the loss.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, final

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from nernlit.errors import UsageError, require_at_least
from nernlit.kernels import Sampling
from nernlit.originals import NERN_TAPS, Original
from nernlit.representation import Representation, load_representation
from nernlit.training.distillation import Distillation
from nernlit.training.moving_average import MovingAverage
from nernlit.training.objectives import Reconstruction, ReconstructionLoss
from nernlit.training.optimization import refuse_averaging
from nernlit.training.plan import Plan
from nernlit.training.rate import Rate
from nernlit.training.recovery import OnDivergence
from nernlit.training.scheme import Precision, Scheme
from nernlit.training.sensitivity import NO_SENSITIVITY, Sensitivity, require_training_images
from nernlit.training.stages import Stage
from nernlit.utilities.processes import Processes
from nernlit.utilities.signals import SIGNALS


@dataclass(frozen=True)
class ReconstructionPhase:
    """Phase 1: Recon-only, with its options.

    Args:
        steps: Optimizer steps; 0 skips the phase.
        optimizer: Creates its optimizer from the predictor's parameters; phase 2's by default.
        scheduler: Creates its learning-rate schedule from the optimizer.
        sampling: Chooses the kernels of each step; uniform by default.
        loss: `mse` or `rmse`.
        sensitivity: How much the error of each weight counts, also for phase 2's `recon_weight` and for the codes of
            `Codebooks`.
    """

    steps: int = 0
    optimizer: OptimizerCallable | None = None
    scheduler: LRSchedulerCallable | None = None
    sampling: Sampling | None = None
    loss: ReconstructionLoss = "mse"
    sensitivity: Sensitivity = NO_SENSITIVITY


@final
class DecoupledDistill(Scheme):
    """Two stages: reconstruction (or `init_from`), then distillation to the end of the run.

    Args:
        representation: The representation to train; None for the one in `init_from`.
        optimizer: Creates phase 2's optimizer from the predictor's parameters.
        scheduler: Creates phase 2's learning-rate schedule from its optimizer.
        reconstruction: Phase 1.
        init_from: A file of an earlier fit; the first phase starts from its predictor. If a representation is also
            given, the file must match it.
        teacher: The classifier whose logits are learned, with the same classes; the original by default.
        kd_weight: Weight of the KL divergence from the teacher.
        temperature: Softmax temperature of student and teacher in the KL divergence.
        kd_inside_log: Added to the probabilities inside the divergence's logarithms; NeRN's code adds 1e-4.
        cross_entropy_weight: Weight of the cross-entropy with the labels.
        recon_weight: Weight of the mean squared reconstruction error in phase 2, in units of the representation's
            scale.
        feature_weight: Weight of the feature-map loss against the original.
        taps: Modules whose feature maps are compared with `feature_weight` above 0; see `FeatureTaps`.
        teacher_flip: Whether the teacher's logits are the mean of those for an image and for its mirror image, which
            are better than either. None: whether training images are mirrored (`data.flip`).
        cache_teacher: Whether the teacher's logits of all training images are computed once, at the start of phase 2,
            instead of in each step. Images must be the same in each epoch: no `pad_crop`, `resized_crop` or `mixup`,
            and `flip` with `teacher_flip` only. The logits take 4 bytes per image and class.
        precision: Precision of the predictor and the CNNs in training steps, `bf16` or `fp32`.
        rate: The price of bits in the loss, for a quantized representation.
        ema: Decay per step of an exponential moving average of the trained parameters in phase 2, which is what is
            evaluated and saved; at least 0 and below 1. 0 evaluates and saves the last values.
        on_divergence: `stop`, or `restart` from the last good state with half the learning rate; see `Scheme`.
        calibration_images: Number of training images that the kept tensors of `tune_kept` are calibrated on at the
            start of phase 2; see `nernlit.representation.calibrate`.
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
        kd_inside_log: float = 0.0,
        cross_entropy_weight: float = 0.0,
        recon_weight: float = 0.0,
        feature_weight: float = 0.0,
        taps: Sequence[str] = NERN_TAPS,
        teacher_flip: bool | None = False,
        cache_teacher: bool = False,
        precision: Precision = "bf16",
        rate: Rate | None = None,
        ema: float = 0.0,
        on_divergence: OnDivergence = "stop",
        calibration_images: int = 0,
    ) -> None:
        _require_phase(reconstruction)
        require_at_least(0, **{"reconstruction.steps": reconstruction.steps})
        representation, rebuilt = load_representation(init_from, representation)
        distillation = Distillation(
            representation.original,
            teacher,
            kd_weight=kd_weight,
            temperature=temperature,
            kd_inside_log=kd_inside_log,
            feature_weight=feature_weight,
            cross_entropy_weight=cross_entropy_weight,
            recon_weight=recon_weight,
            taps=taps,
            teacher_flip=bool(teacher_flip),
            cache_teacher=cache_teacher,
        )
        if not kd_weight and not cross_entropy_weight and not feature_weight:
            raise UsageError(
                "kd_weight, cross_entropy_weight and feature_weight are all 0; set at least one of them above 0."
            )
        phase_1 = Stage(
            Reconstruction(reconstruction.sampling, reconstruction.loss),
            reconstruction.optimizer or optimizer,
            reconstruction.scheduler,
            reconstruction.steps,
            "--model.reconstruction" if reconstruction.optimizer else "--model",
        )
        phase_2 = Stage(distillation, optimizer, scheduler)
        stages = [phase_1, phase_2] if reconstruction.steps else [phase_2]
        options = reconstruction.sensitivity, on_divergence, calibration_images
        super().__init__(representation, stages, precision, rebuilt, rate, *options)
        is_fitted = representation.predictor.is_fitted or not representation.is_new
        self.has_phase_1 = bool(init_from or reconstruction.steps or is_fitted)
        self._teaches_itself = representation.is_own_original and teacher is None and not cross_entropy_weight
        self.reconstruction, self.distillation, self.teacher_flip = reconstruction, distillation, teacher_flip
        self.needs_image_numbers = cache_teacher
        self.average = MovingAverage(ema)
        if ema and representation.predictor.changes_after_steps:
            raise UsageError(
                f"ema={ema} would average codewords whose codes change (the predictor's move); pass move: 0 or ema: 0."
            )

    # Phase 2 may average the parameters. They hold the average from the start of a validation to the next step.

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if self.teacher_flip is None:
            augmentation = getattr(self._data, "augmentation", None)
            self.distillation.teacher_flip = augmentation is not None and augmentation.flip
        if stage == "fit" and self.distillation.cache_teacher:
            self._require_fixed_images()
        if stage == "fit":
            self.average.clear()
        if stage == "fit" and self.average.decay:
            refuse_averaging(self.trainer, "parameters that `ema` already averages; pass ema: 0")

    def _require_fixed_images(self) -> None:
        """Refuse `cache_teacher` where the teacher's logits of an image are not the same in each epoch."""
        require_training_images("cache_teacher", "leave it out", self.representation.original, self._data)
        augmentation = self._data.augmentation
        for name, value in augmentation.changing().items():
            none = "null" if name == "resized_crop" else 0
            raise UsageError(
                f"cache_teacher=True, but data.{name}={value} changes the training images in each epoch; pass "
                f"--data.{name} {none}, or leave out cache_teacher."
            )
        if augmentation.flip and not self.distillation.teacher_flip:
            raise UsageError(
                "cache_teacher=True, but data.flip mirrors training images, and the teacher answers differently; pass "
                "--model.teacher_flip true, or leave out cache_teacher."
            )

    def loss_terms(self, batch: Any) -> dict[str, Tensor]:
        if self.distillation.needs_teacher_logits and self.stage == len(self.stages) - 1:
            processes = Processes.from_trainer(self.trainer)
            images, count = self._data.numbered_images(processes), self._data.num_training_images
            # Interruptible: it changes no training state. Several processes must stop at the same step, so they wait.
            with SIGNALS.released() if processes.world_size == 1 else nullcontext():
                self.distillation.cache_teacher_logits(images, count, self.autocast, processes)
        return super().loss_terms(batch)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self._show_average(False)
        super().on_train_batch_start(batch, batch_idx)

    def optimizer_step(self, *args: Any, **options: Any) -> None:
        super().optimizer_step(*args, **options)
        if self.stage == len(self.stages) - 1:
            self.average.update(dict(self.named_parameters()))

    def on_validation_start(self) -> None:
        super().on_validation_start()
        self._show_average(True)

    def trained_state(self) -> dict[str, Any]:
        return {**super().trained_state(), "average": self.average.others}

    def load_trained_state(self, state: Mapping[str, Any]) -> None:
        super().load_trained_state(state)
        self.average.others = state["average"]

    def on_train_end(self) -> None:
        super().on_train_end()
        self._show_average(True)
        if self.stage < len(self.stages) - 1 and not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            rank_zero_warn(
                f"The fit ended in phase 1, after {self.trainer.global_step} of its {self.reconstruction.steps} steps, "
                "so nothing was distilled. Without the limit that ended it, --ckpt_path last continues it."
            )

    def _show_average(self, average: bool) -> None:
        self.average.show(dict(self.named_parameters()), average)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        self.average.save(checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.has_phase_1 = True
        if self._trainer is not None and self.trainer.state.fn == "fit":
            self.average.load(checkpoint)

    def on_fit_start(self) -> None:
        if not self.has_phase_1:
            raise UsageError(
                "Decoupled-distill has no phase 1: pass --model.init_from FILE, or --model.reconstruction.steps N."
            )
        if self._teaches_itself:
            raise UsageError(
                "the original is the network decoded from the .nern file, so the student would be its own teacher; "
                "pass --model.teacher, --model.cross_entropy_weight, or the original (--model.representation)."
            )
        super().on_fit_start()
        if self.trainer.ckpt_path is None and len(self.stages) == 1:
            self.calibrate()

    def start_stage(self) -> None:
        super().start_stage()
        self.calibrate()

    @classmethod
    def check_plan(cls, plan: Plan, options: Any) -> None:
        _require_phase(options.reconstruction)
        steps = options.reconstruction.steps
        if plan.most_steps <= steps and not plan.is_trial:
            raise UsageError(
                f"the run ends after {plan.most_steps:.0f} steps, within phase 1 (reconstruction.steps={steps}); "
                "pass a larger --trainer.max_epochs, or fewer --model.reconstruction.steps."
            )


def _require_phase(reconstruction: Any) -> None:
    if reconstruction is None:  # the option parser lets null pass
        raise UsageError("--model.reconstruction null: expected the options of phase 1; steps: 0 skips it.")
