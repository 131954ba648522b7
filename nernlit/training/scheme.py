"""The base class of schemes: stages, each with an objective, that train a representation."""

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, Self

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.nn import Parameter

from nernlit.errors import DivergenceError, UsageError, require_one_of
from nernlit.originals import Original
from nernlit.predictors import PredictorEnsemble
from nernlit.representation import Representation, without_fitting
from nernlit.training.class_names import take_class_names
from nernlit.training.classifier import ClassifierModule
from nernlit.training.error_weights import ErrorWeights, changes_fit
from nernlit.training.kept_calibration import KeptCalibration
from nernlit.training.measurements import Measurements, Networks
from nernlit.training.objectives import NO_LABELS, Step
from nernlit.training.optimization import (
    refuse_averaging,
    refuse_callbacks_on_weights,
    relative_rate,
)
from nernlit.training.plan import total_steps
from nernlit.training.rate import Rate, RateTerm
from nernlit.training.recovery import OnDivergence, Recovery
from nernlit.training.sensitivity import NO_SENSITIVITY, Sensitivity
from nernlit.training.stages import Stage, refuse_other_lengths, starts_of
from nernlit.training.teachers import require_same_teacher
from nernlit.utilities.constants import WithConstants
from nernlit.utilities.processes import Processes

Precision = Literal["fp32", "bf16"]


class Scheme(ClassifierModule, WithConstants, ABC):
    """A module that trains a representation in one or more stages.

    The stage is a function of the step's number, and checkpoints record the stage whose optimizer state they hold, so a
    fit can be resumed in any stage.

    Validation predicts all weights once and runs the original with them; the original itself is measured in the first
    validation and the first test of a run, and logged beside it.

    Args:
        representation: The representation to train.
        stages: The stages in order; all but the last have a number of steps.
        precision: Precision of the predictor and the CNNs in training steps: `bf16` runs them under autocast.
            Parameters, losses and evaluations are always fp32.
        rate: Options of the rate term for a quantized predictor; None for no rate term.
        rebuilt: Hyperparameters that checkpoints hold in place of the given ones, so that a representation that came
            out of a file can be built again; see `load_representation`.
        sensitivity: How much the error of each weight counts in reconstruction.
        on_divergence: What happens when a loss or a weight is not finite: `stop` ends the fit; `restart` returns to the
            state of the last validation, epoch's end or stage's start, and halves the learning rate for the rest of the
            fit, five times at most.
        calibration_images: Number of training images that the kept tensors of `tune_kept` are calibrated on; see
            `nernlit.representation.calibrate`. 0 does not calibrate; None if the scheme cannot.
    """

    @abstractmethod  # a scheme lists its stages in its constructor
    def __init__(
        self,
        representation: Representation,
        stages: Sequence[Stage],
        precision: Precision = "fp32",
        rebuilt: Mapping[str, Any] | None = None,
        rate: Rate | None = None,
        sensitivity: Sensitivity = NO_SENSITIVITY,
        on_divergence: OnDivergence = "stop",
        calibration_images: int | None = None,
    ) -> None:
        super().__init__(representation.original)
        representation.original.require_weights()
        self.representation = representation
        require_one_of(Precision, precision=precision)
        self.precision = precision
        self.stages = tuple(stages)
        self.objectives = nn.ModuleList(dict.fromkeys(stage.objective for stage in stages))
        self.stage = 0
        self.replaced_hyperparameters = dict(rebuilt or {})
        self._tuned = list(representation.tuned.parameters())
        self._used_images = False  # since the last optimizer step
        self.calibration = KeptCalibration(
            representation, calibration_images, self.trains_on_images, type(self).__name__
        )
        self.rate = None if rate is None else RateTerm(representation, rate)
        reconstructs = any(stage.objective.reconstructs for stage in stages)
        self.error_weights = ErrorWeights(sensitivity, representation, reconstructs)
        self.recovery = Recovery(on_divergence)
        self.seed = self._own_seed = torch.initial_seed()
        self.sizes_N = representation.learned.per_kernel().cpu()
        self.norms_N = representation.target.flatten(1).norm(dim=1).cpu()
        #: The step and the stages' ends of the checkpoint that a fit is resumed from.
        self._resumed: tuple[int, list[float]] | None = None

    @property
    def target(self) -> Tensor:
        """The kernels (N, K, K) that the current stage reconstructs; `norms_N` holds their norms."""
        return self.representation.target

    @property
    def ensemble(self) -> PredictorEnsemble | None:
        """Predictors that are trained instead of the representation's own, or None."""
        return None

    @property
    def curve(self) -> str | None:
        """Name of an additional metric for the current stage's error, or None."""
        return None

    def loss_terms(self, batch: Any) -> dict[str, Tensor]:
        step = Step(
            representation=self.representation,
            batch=batch,
            target=self.target,
            norms=self.norms_N,
            sizes=self.sizes_N,
            error_weights=self.error_weights.table,
            filter_errors=self.error_weights.filters,
            ensemble=self.ensemble,
            number=self.trainer.fit_loop.total_batch_idx,
            optimizer_step=self.trainer.global_step,
            seed=self.seed,
            rank=self.trainer.global_rank,
            world_size=self.trainer.world_size,
            autocast=self.autocast,
            mean=self.mean_with_gradients,
            curve=self.curve,
        )
        terms: dict[str, Tensor] = self.stages[self.stage].objective(step)
        self._used_images |= step.used_images
        if self._tuned and self.trainer.world_size > 1:
            # DistributedDataParallel demands a gradient for every parameter in every step, and reconstruction has none;
            # `on_before_optimizer_step` removes these zeros.
            first = next(iter(terms))
            terms[first] = terms[first] + 0 * torch.stack([value.sum() for value in self._tuned]).sum()
        if self.rate is not None:
            terms["rate"] = self.rate(step.metrics, step.optimizer_step)
            self.step_metrics["size/file_bytes_estimate"] = self.rate.file_bytes
        self.step_metrics |= {f"train/{name}": value for name, value in step.metrics.items()}
        return terms

    def autocast(self) -> AbstractContextManager[Any]:
        """The autocast context of training steps."""
        if self.precision == "bf16":
            return torch.autocast(self.device.type, torch.bfloat16)
        return nullcontext()

    def mean_with_gradients(self, value: Tensor) -> Tensor:
        """The mean of a scalar over all processes, with gradients."""
        if self.trainer.world_size == 1:
            return value
        gathered = self.all_gather(value, sync_grads=True)
        assert isinstance(gathered, Tensor)
        return gathered.mean()

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Logits (B, C) of the reconstructed CNN for pixels in [0, 1]."""
        logits: Tensor = self.representation(images_BCHW)
        return logits

    def trained_parameters(self) -> Iterable[Parameter]:
        return self.representation.trained_parameters()

    def lr_multipliers(self) -> dict[Parameter, float]:
        return self.representation.lr_multipliers()

    @property
    def is_trained(self) -> bool:
        return False  # a new predictor is random

    def network(self) -> tuple[str, dict[str, Tensor]]:
        return self.representation.original.name, self.representation.reconstructed()

    @property
    def teacher(self) -> Original | None:
        """The teacher; None if it is the original."""
        teachers = [stage.objective.teacher for stage in self.stages]
        return next((teacher for teacher in teachers if teacher is not None), None)

    # The stages of a fit.

    def stage_starts(self) -> Sequence[int]:
        """The optimizer steps at which stages 1, 2, ... begin; stage 0 begins at step 0."""
        return starts_of(self.stages)

    def start_stage(self) -> None:
        """Called at the start of `self.stage`, before its optimizer is created. Does nothing by default."""

    def planned_steps(self) -> int:
        """Number of steps of the current stage."""
        total = super().planned_steps()
        starts = [0, *self.stage_starts()]
        ends = [*starts[1:], max(total, starts[-1] + 1)]
        return ends[self.stage] - starts[self.stage]

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self.trains_on_images:
            super().on_train_batch_start(batch, batch_idx)
        stage = bisect_right(self.stage_starts(), self.trainer.global_step)
        if stage != self.stage:
            self.recovery.keep_if_finite(self)  # of the stage that is over, which may just have diverged
            self.stage = stage
            self.start_stage()
            self.trainer.strategy.setup_optimizers(self.trainer)
            self.representation.predictor.start_stage()
            self.recovery.keep(self)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        if not self._used_images:
            for value in self._tuned:  # as with one process: weight decay must not change them in such a step
                value.grad = None
        self._used_images = False

    def optimizer_step(self, *args: Any, **options: Any) -> None:
        self.representation.is_new = False
        with self.recovery.lowered(self.trainer.optimizers[0]):
            super().optimizer_step(*args, **options)
            rate = relative_rate(self.trainer.optimizers[0])
        for name, value in self.representation.predictor.after_step(rate, self.reduced_mean).items():
            self.log(f"train/{name}", value)

    def optimizer_factories(self) -> tuple[OptimizerCallable, LRSchedulerCallable | None]:
        stage = self.stages[self.stage]
        return stage.optimizer, stage.scheduler

    @property
    def optimizer_options(self) -> str:
        return self.stages[self.stage].options

    def configure_optimizers(self) -> Any:
        if self._resumed is not None:
            step, before = self._resumed
            refuse_other_lengths(type(self).__name__, self.stage, step, before, self._stage_ends())
            self._resumed = None
        later = {(id(stage.optimizer), id(stage.scheduler)): stage for stage in self.stages[self.stage + 1 :]}
        for stage in later.values():  # refuses their options now, and not when they start
            optimizer, _ = self.build(stage.optimizer, stage.scheduler, stage.options)
            self.recovery.require_support(optimizer)
        return super().configure_optimizers()

    def _stage_ends(self) -> list[float]:
        total = total_steps(self.trainer)  # loads the data, on which the stages' lengths may depend
        return [*self.stage_starts(), total]

    def calibrate(self) -> None:
        """Calibrate the kept tensors on training images, if there are `calibration_images`."""
        self.calibration.run(self.trainer, self._data)

    # Divergence.

    @property
    def lr_factor(self) -> float:
        return self.recovery.factor

    def checked_terms(self, batch: Any) -> dict[str, Tensor]:
        while True:
            try:
                return super().checked_terms(batch)
            except DivergenceError as error:
                self.recovery.restart(error, self)

    def on_train_start(self) -> None:
        if self.recovery.step is None:  # otherwise the checkpoint had the last good state
            self.recovery.keep(self)

    def on_validation_start(self) -> None:
        if self.trainer.state.fn == "fit" and not self.trainer.sanity_checking:
            self.recovery.keep_if_finite(self)

    def on_train_epoch_end(self) -> None:
        self.recovery.keep_if_finite(self)

    def trained_state(self) -> dict[str, Any]:
        """What training changes within a stage, except the optimizer; no copy."""
        rate, predictor = self.rate, self.representation.predictor
        return {
            "module": self.state_dict(),
            "predictor": predictor.training_state(),
            "rate": {} if rate is None else rate.state_dict(),
        }

    def load_trained_state(self, state: Mapping[str, Any]) -> None:
        """Return to such a state."""
        self.load_state_dict(state["module"])
        self.representation.predictor.load_training_state(state["predictor"])
        if self.rate is not None:
            self.rate.load_state_dict(state["rate"])

    # Runs and their checkpoints.

    def needs_images(self, stage: str) -> bool:
        uses = self.trains_on_images or self.error_weights.option.needs_images or self.calibration.num_images > 0
        return stage == "fit" and uses

    @property
    def trains_on_images(self) -> bool:
        """Whether any stage uses images."""
        return any(stage.objective.needs_images for stage in self.stages)

    def setup(self, stage: str) -> None:
        starts = stage == "fit" and self.trainer.ckpt_path is None
        weighs = starts and self.error_weights.are_missing  # a checkpoint has them
        if stage == "fit":
            self._require_images(weighs)
        super().setup(stage)
        if starts:
            self.stage = 0  # an earlier fit of this module ended in its last one
            if self._resumed is not None:  # one that could not be resumed
                self._resumed, self.seed = None, self._own_seed
        self.recovery = Recovery(self.recovery.on_divergence)  # of this run
        # Of this run: the next one may have other images.
        self.measurements = Measurements(self.representation, self.save_options)
        for part in self.stages:
            part.objective.reset()
        # All processes must use the same seed, or their shares of the global batch would overlap.
        self.seed = self.trainer.strategy.broadcast(self.seed)
        if weighs:
            self._weigh_errors()
        if stage == "fit":
            self._share_new_predictor()

    def _require_images(self, weighs: bool) -> None:
        """Refuse a fit without the images that its options need; `weighs`: it computes sensitivities."""
        if weighs:
            self.error_weights.option.require_images(self.representation.original, self._data)
        self.calibration.require_images(self._data)
        if self.trains_on_images and self.has_images and getattr(self._data, "train_on", None) == "none":
            raise UsageError(f"{type(self).__name__} needs images; pass --data.train_on images (or noise).")
        labels = any(stage.objective.needs_labels for stage in self.stages)
        if labels and getattr(self._data, "train_on", None) == "noise":
            raise UsageError(NO_LABELS)
        refuse_callbacks_on_weights(self.trainer)
        if self.recovery.restarts_fits:
            refuse_averaging(self.trainer, "weights that a restart takes back; pass on_divergence: stop")
        if self.representation.predictor.changes_after_steps:
            refuse_averaging(self.trainer, "codewords whose codes change (the predictor's move); pass move: 0")

    def _share_new_predictor(self) -> None:
        """Give all processes the first one's order, codes and predictor: machines may round differently."""
        if self.trainer.world_size == 1 or not self.representation.is_new:
            return
        broadcast = self.trainer.strategy.broadcast
        self.load_state_dict(broadcast(self.state_dict()))
        self.representation.is_new = True  # load_state_dict cleared it, but the broadcast state is still an initial one
        if self.rate is not None:
            self.rate.load_state_dict(broadcast(self.rate.state_dict()))

    def _weigh_errors(self) -> None:
        """Compute the sensitivities, and fit the predictor to the original again if they change it."""
        strategy = self.trainer.strategy
        parts = self.representation, self._data, strategy.root_device, Processes.from_trainer(self.trainer)
        self.error_weights.compute(*parts, strategy.broadcast)
        if (weights_NKK := self.error_weights.table) is not None and changes_fit(self.representation):
            self.representation.fit_predictor(weights_NKK)
            self.on_predictor_fitted()

    def on_predictor_fitted(self) -> None:
        """Called at the start of a fit, after the predictor was initialized again with error weights."""
        if self.rate is not None:
            self.rate = RateTerm(self.representation, self.rate.options)  # its step sizes are those of the fit

    @classmethod
    def load_from_checkpoint(cls, *args: Any, **kwargs: Any) -> Self:
        """As in Lightning. The predictor is not fitted to the original, because the checkpoint's replaces it."""
        with without_fitting():
            return super().load_from_checkpoint(*args, **kwargs)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        try:
            super().on_save_checkpoint(checkpoint)
        except DivergenceError as error:  # between two validations
            self.recovery.restart(error, self)
            checkpoint["state_dict"] = self.state_dict()
            checkpoint["optimizer_states"] = [self.trainer.strategy.optimizer_state(self.trainer.optimizers[0])]
        checkpoint["sampling_seed"] = self.seed
        checkpoint["stage"] = self.stage
        if self.rate is not None:
            checkpoint["rate"] = self.rate.state_dict()
        if weights := self.error_weights.checkpoint():
            checkpoint["sensitivity"] = weights
        if self.teacher is not None:
            checkpoint["teacher"] = self.teacher.fingerprint()
        if self.trainer.state.fn == "fit":
            checkpoint["stage_ends"] = self._stage_ends()
            if state := self.representation.predictor.training_state():
                checkpoint["predictor_training"] = state
            if recovery := self.recovery.state_dict(self.trainer.global_step):
                checkpoint["recovery"] = recovery

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take over the checkpoint's stage and seed.

        Raises:
            CheckpointError: If a fit is resumed with another teacher or another sensitivity.
        """
        super().on_load_checkpoint(checkpoint)
        self.seed, self.stage = checkpoint["sampling_seed"], checkpoint.get("stage", 0)
        if self.rate is not None and "rate" in checkpoint:
            self.rate.load_state_dict(checkpoint["rate"])
        self.error_weights.load(checkpoint.get("sensitivity"), self.representation)
        if self._trainer is None:  # `load_from_checkpoint`; the public `trainer` raises then
            return
        if self.trainer.state.fn == "fit":  # an evaluation resumes nothing
            self.representation.predictor.load_training_state(checkpoint.get("predictor_training", {}))
            self.recovery.load_state_dict(checkpoint.get("recovery", {}))
            if "stage_ends" in checkpoint:
                self._resumed = checkpoint["global_step"], checkpoint["stage_ends"]
            self.error_weights.require_same_options(checkpoint.get("sensitivity"))
            require_same_teacher(self.teacher, checkpoint)

    @property
    def save_options(self) -> dict[str, Any]:
        """The options of `Representation.save` that the sizes are measured with: those of `rate`, or none."""
        if self.rate is None:
            return {}
        return {"kept": self.rate.options.kept, "fold_batch_norm": self.rate.options.fold_batch_norm}

    def on_fit_start(self) -> None:
        super().on_fit_start()
        take_class_names(self.representation.original, self._data)  # checkpoints and .nern files keep them
        self.train()  # Lightning keeps the mode, and a representation from a file is in evaluation mode
        if self.trainer.ckpt_path is None and not self.representation.is_new:
            self.representation.predictor.start_stage()
        if self.logger is not None and self.trainer.is_global_zero:
            sizes = self.representation.sizes(**self.save_options)
            figures = {"cr_paper": sizes.cr_paper, "cr_file": sizes.cr_file}
            figures["predictor_params"] = sizes.predictor_params
            self.logger.log_metrics({f"size/{name}": value for name, value in figures.items()}, step=0)

    # Evaluations.

    def predicted_networks(self) -> Networks:
        """The networks that an evaluation measures: suffix of the metrics' names -> predicted weights."""
        return {"": self.representation.weights()}

    def classifiers(self, stage: str) -> dict[str, Callable[[Tensor], Tensor]]:
        take_class_names(self.representation.original, self._data)
        return self.measurements.start(stage, self.predicted_networks())

    def finite_weights(self) -> dict[str, Tensor]:
        return self.measurements.finite_weights()

    def log_results(self, stage: str, results: Mapping[str, Tensor]) -> None:
        # The sanity check before training uses a few images only.
        everything = self.measurements.finish(stage, results, keep=not self.trainer.sanity_checking)
        super().log_results(stage, everything)
