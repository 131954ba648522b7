"""The base class of all LightningModules here: hooks for training, evaluation and the optimizer.

Metrics are `stage/quantity[_condition]`.
"""

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import lightning as L
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import OneCycleLR

from nernlit.errors import CheckpointError, DivergenceError, UsageError
from nernlit.optimizers import NeedsTotalSteps
from nernlit.originals import Original, mask_names, require_classifier, require_pixels
from nernlit.training.batches import images_of
from nernlit.training.divergence import ADVICE, FiniteLossCheck, not_finite
from nernlit.training.evaluation import Evaluation, ImageBatch
from nernlit.training.optimization import (
    build_optimizer,
    build_schedule,
    refuse_callbacks,
    refuse_stops_without_validation,
)
from nernlit.training.plan import Plan, total_steps
from nernlit.training.strategies import refuse_sharded_strategies


class ClassifierModule(L.LightningModule, ABC):
    """Base class of the modules: optimizer, evaluation of classifiers, checks for divergence, means over processes.

    Args:
        original: The original; its numbers of classes and image channels are used.
    """

    def __init__(self, original: Original) -> None:
        super().__init__()
        self.num_classes, self.in_chans = original.num_classes, original.in_chans
        self.original_name = original.name
        self._masks = {f"{prefix}{name}" for name in mask_names(original.net) for prefix in ("", "original.net.")}
        #: Names of the loss terms of the last step. Steps of the same terms take about the same time.
        self.term_names: tuple[str, ...] = ()
        #: Additional metrics of the current step: full metric name -> scalar.
        self.step_metrics: dict[str, Tensor] = {}
        self._resumed_epoch_steps: float | None = None  # of the checkpoint that a fit resumes
        #: Identity of the trainer of the last fit -> the intervals that it had, until they are restored.
        self._intervals: dict[int, tuple[int | None, int | None, int | None]] = {}
        self.fitted_steps = 0  # of the last fit, or of the checkpoint that was loaded
        #: Whether the figures of evaluations outside of fits go to the loggers.
        self.logs_evaluations = True
        #: Hyperparameters that are written to checkpoints instead of the given ones.
        self.replaced_hyperparameters: dict[str, Any] = {}

    #: Whether training batches must also contain the numbers (B,) of the images among the training images.
    needs_image_numbers: bool = False

    @abstractmethod
    def loss_terms(self, batch: ImageBatch) -> dict[str, Tensor]:
        """The weighted loss terms of a step by name; their sum is minimized."""

    @abstractmethod
    def trained_parameters(self) -> Iterable[Parameter]:
        """The parameters that the optimizer updates."""

    def lr_multipliers(self) -> dict[Parameter, float]:
        """Parameters whose learning rate is not the optimizer's, and the ratio of the two."""
        return {}

    @property
    def lr_factor(self) -> float:
        """The ratio of the learning rates to those of the schedule."""
        return 1.0

    @abstractmethod
    def optimizer_factories(self) -> tuple[OptimizerCallable, LRSchedulerCallable | None]:
        """Functions that create the optimizer and its schedule, which is stepped after each optimizer step."""

    @property
    def optimizer_options(self) -> str:
        """Prefix of the options `optimizer` and `scheduler` on the command line, for messages."""
        return "--model"

    @abstractmethod
    def classifiers(self, stage: str) -> dict[str, Callable[[Tensor], Tensor]]:
        """The classifiers that `val` or `test` measures: suffix of the metrics' names -> classifier."""

    def finite_weights(self) -> dict[str, Tensor]:
        """Suffix -> whether the predicted weights of that classifier are finite."""
        return {}

    @property
    @abstractmethod
    def is_trained(self) -> bool:
        """Whether an evaluation makes sense before a checkpoint is loaded."""

    @abstractmethod
    def network(self) -> tuple[str, dict[str, Tensor]]:
        """The module's network: its timm name and its state dict."""

    def needs_images(self, stage: str) -> bool:
        """Whether `fit`, `validate`, `test` or `predict` needs images."""
        return False

    def setup(self, stage: str) -> None:
        what = getattr(stage, "value", stage)  # Lightning's is an enumeration
        if stage == "fit":
            at_once = self.trainer.strategy.root_device.type == "cpu" and self.trainer.world_size == 1
            self._losses = FiniteLossCheck(at_once, self.all_flags)
            self._resumed_epoch_steps = None
        if self.needs_images(stage):
            require_classifier(f"{type(self).__name__} to {what}", self.original_name, self.num_classes)
        if not self.has_images and self.needs_images(stage):
            raise UsageError(
                f"{type(self).__name__} needs images to {what}, and there are none (`data: null`); "
                "name the data (--data CLASS and its options)."
            )
        if hasattr(self._data, "numbered"):  # another module may have asked for it
            self._data.numbered = self.needs_image_numbers

    #: Whether training images must be pixels in [0, 1].
    checks_pixels = True
    #: Precisions of the trainer (`--trainer.precision`) that the module works in.
    precisions: tuple[str, ...] = ("32-true",)

    @classmethod
    def check_plan(cls, plan: Plan, options: Any) -> None:
        """Check that the length of a fit suits the scheme. By default any length does.

        Args:
            plan: The fit's length, as far as it is known.
            options: The module, or the options that it would be built from; read by attribute.

        Raises:
            UsageError: If the scheme cannot work with this length.
        """

    def configure_callbacks(self) -> Any:
        """Lightning's first hook of a run; used to check strategy, precision and length before any data is read."""
        refuse_sharded_strategies(self.trainer.strategy)
        refuse_callbacks(self.trainer)
        precision = self.trainer.precision
        if precision not in self.precisions:
            half = "; --model.precision bf16 runs training steps in it" if "bf16" in precision else ""
            raise UsageError(
                f"--trainer.precision {precision}: {type(self).__name__} works in {', '.join(self.precisions)}{half}."
            )
        if self.trainer.state.fn == "fit":
            self.check_plan(Plan.from_trainer(self.trainer, self._data), self)
        return super().configure_callbacks()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Check the first images of each epoch, which may be those of a user's own datamodule."""
        is_noise = getattr(self._data, "train_on", None) == "noise"
        if batch_idx == 0 and self.checks_pixels and self.needs_images("fit") and self.has_images and not is_noise:
            require_pixels(images_of(batch))

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Ensure a validation at the end of a fit, also if max_steps, max_time or a callback ends it."""
        trainer = self.trainer
        over = trainer.is_last_batch and trainer.current_epoch + 1 == trainer.max_epochs
        limit = over or trainer.global_step == trainer.max_steps  # stronger than min_epochs and min_steps
        if limit:
            trainer.should_stop = True
            trainer.fit_loop.min_epochs, trainer.fit_loop.epoch_loop.min_steps = 0, None
        epochs, steps = trainer.min_epochs or 0, trainer.min_steps or 0
        early = trainer.should_stop and trainer.current_epoch + 1 >= epochs and trainer.global_step >= steps
        if early and trainer.check_val_every_n_epoch:
            trainer.check_val_every_n_epoch = 1

    def _restore_intervals(self) -> None:
        loop, before = self.trainer.fit_loop, self._intervals.get(id(self.trainer))
        if before is not None:
            self.trainer.check_val_every_n_epoch, loop.min_epochs, loop.epoch_loop.min_steps = before
        self._intervals = {}

    def on_fit_start(self) -> None:
        loop = self.trainer.fit_loop
        self._restore_intervals()  # an earlier fit may have raised after it changed them
        own = self.trainer.check_val_every_n_epoch, loop.min_epochs, loop.epoch_loop.min_steps
        self._intervals = {id(self.trainer): own}
        refuse_stops_without_validation(self.trainer)

    def all_flags(self, flags: Tensor) -> Tensor:
        """Logical and of flags (0 or 1) over all processes."""
        if self.trainer.world_size == 1:
            return flags
        gathered = self.all_gather(flags)
        assert isinstance(gathered, Tensor)
        return gathered.amin(0)

    def refuse_divergence(self) -> None:
        """Called before a fit validates, saves or ends.

        Raises:
            DivergenceError: If a loss so far, or a weight now, is not finite.
        """
        self._losses.check()
        if diverged := self.diverged(self.state_dict()):
            raise DivergenceError(
                f"the fit has diverged: after step {self.trainer.global_step - 1} {diverged[0]} holds numbers that are "
                f"not finite; {ADVICE}."
            )

    def diverged(self, state: Mapping[str, Any]) -> list[str]:
        """The names of the entries of the module's state that should be finite but are not."""
        return self._not_finite(state)

    def _not_finite(self, state: Mapping[str, Any]) -> list[str]:
        return [name for name in not_finite(state) if name not in self._masks]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["module"] = type(self).__name__
        if self.trainer.state.fn == "fit":
            checkpoint["data"], checkpoint["epoch_steps"] = self._data_name, self._epoch_steps
            self.refuse_divergence()  # a useless checkpoint must not replace a good one

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take over the number of steps.

        Raises:
            CheckpointError: If another class wrote the checkpoint.
            UsageError: If a fit is resumed with another dataset.
        """
        own, other = type(self).__name__, checkpoint.get("module")
        if other not in (None, own):
            raise CheckpointError(f"the checkpoint is of a {other}, and this is a {own}; pass a checkpoint of a {own}.")
        self.fitted_steps = int(checkpoint.get("global_step", 0))
        if self._trainer is None or self.trainer.state.fn != "fit":
            return
        self._resumed_epoch_steps = checkpoint.get("epoch_steps")
        # Lightning loads a datamodule's state only into one of the same class.
        before, now = checkpoint.get("data"), self._data_name
        if before is not None and now is not None and before != now:
            raise UsageError(
                f"the fit was started with {before}, and this is {now}, whose accuracies are not comparable; pass the "
                "same data, or start a new fit (--model.init_from)."
            )

    @property
    def _epoch_steps(self) -> float:
        """Optimizer steps of an epoch; known when the data is loaded."""
        batches: float = self.trainer.num_training_batches
        return math.ceil(batches / self.trainer.accumulate_grad_batches) if math.isfinite(batches) else math.inf

    @property
    def _data_name(self) -> str | None:
        """The class of the datamodule; None for data loaders."""
        return None if self._data is None else type(self._data).__qualname__

    def on_train_end(self) -> None:
        self._restore_intervals()
        self.fitted_steps = self.trainer.global_step
        self.refuse_divergence()

    def checked_terms(self, batch: Any) -> dict[str, Tensor]:
        """The loss terms of a step.

        Raises:
            DivergenceError: If they, or those of steps that have not been checked yet, are not finite.
        """
        terms = self.loss_terms(batch)
        self._losses.record(self.trainer.global_step, self.trainer.optimizers[0].param_groups[0]["lr"], terms)
        return terms

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        terms = self.checked_terms(batch)
        self.term_names = tuple(terms)
        loss = torch.stack(list(terms.values())).sum()
        self._log_step({**terms, "loss": loss})
        return loss

    def _log_step(self, figures: Mapping[str, Tensor]) -> None:
        """Log the loss terms of a step and its other figures, as means over all processes."""
        values = {**{f"train/{name}": value for name, value in figures.items()}, **self.step_metrics}
        self.step_metrics = {}
        if self.trainer.world_size > 1:  # one reduction for all values: each takes about a millisecond
            joined = self.reduced_mean(
                torch.stack([value.detach().to(self.device, torch.float32) for value in values.values()])
            )
            values = dict(zip(values, joined, strict=True))
        for name, value in values.items():
            self.log(name, value.detach(), prog_bar=name in ("train/loss", "train/explained_power"))

    def reduced_mean(self, value: Tensor) -> Tensor:
        """The mean of a tensor over all processes, bitwise equal on all of them."""
        reduced = self.trainer.strategy.reduce(value, reduce_op="mean")
        assert isinstance(reduced, Tensor)
        return reduced

    def on_validation_epoch_start(self) -> None:
        self._start_evaluation("val")

    def on_test_epoch_start(self) -> None:
        self._start_evaluation("test")

    def validation_step(self, batch: ImageBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._evaluation.update(batch)

    def test_step(self, batch: ImageBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._evaluation.update(batch, dataloader_idx)

    def on_validation_epoch_end(self) -> None:
        self._report("val")

    def on_test_epoch_end(self) -> None:
        self._report("test")

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> tuple[str, dict[str, Tensor]]:
        """The network's timm name and state dict, whatever the batch; the command line writes it to a file."""
        name, state = self.network()
        if diverged := self._not_finite(state):
            raise DivergenceError(f"{diverged[0]} holds numbers that are not finite; pass another checkpoint.")
        return name, state

    def _start_evaluation(self, stage: str) -> None:
        if self.trainer.state.fn == "fit" and not self.trainer.sanity_checking:
            self.refuse_divergence()
        if self.has_images:
            require_classifier("the accuracy on images", self.original_name, self.num_classes)
        classifiers = self.classifiers(stage)
        # Evaluation sets beside the dataset's own, whatever the data calls them.
        conditions = list(getattr(self._data, "conditions", [])) if stage == "test" else []
        loaders = len(self.trainer.num_test_batches if stage == "test" else self.trainer.num_val_batches)
        if loaders > 1 + len(conditions):
            raise UsageError(
                f"there are {loaders} {stage} data loaders; expected {1 + len(conditions)}. "
                "Pass one at a time; further test sets are given by the data module (`eval_sets`)."
            )
        self._evaluation = Evaluation(
            classifiers if self.has_images else {},
            self.finite_weights(),
            self.num_classes,
            self.in_chans,
            conditions,
            self.device,
        )

    @property
    def has_images(self) -> bool:
        """Whether there are images: of the data module, or of data loaders."""
        return getattr(self._data, "has_images", True)

    @property
    def _data(self) -> Any:
        # Not `trainer.datamodule`, which Lightning keeps when the next call passes loaders.
        selector = self.trainer._data_connector._datahook_selector
        return None if selector is None else selector.datamodule

    def _report(self, stage: str) -> None:
        evaluation = self._evaluation
        flags = evaluation.flags(self.all_flags)
        unusable = [suffix for suffix, (finite, finite_logits) in flags.items() if not (finite and finite_logits)]
        # Overflowing logits are accepted during a fit, but not at its end or in a separate evaluation; those of the
        # original, which no training changes, never.
        on_the_way = self.trainer.state.fn == "fit" and not self.trainer.should_stop
        self.refuse_unusable(stage, [s for s in unusable if s == "_original" or not (on_the_way and flags[s][0])])
        self.log_results(stage, evaluation.results(self.measured(evaluation.classifiers, unusable)))

    def measured(self, suffixes: Iterable[str], unusable: Sequence[str]) -> list[str]:
        """The suffixes whose metrics are reported; `unusable` are those with values that are not finite."""
        if unusable and not self.trainer.sanity_checking:
            rank_zero_warn(
                f"After step {self.trainer.global_step - 1} the network's logits are not finite for some validation "
                "images, which count as wrong. If this warning persists, lower the learning rate (the optimizer's lr)."
            )
        return list(suffixes)

    def refuse_unusable(self, stage: str, suffixes: Sequence[str]) -> None:
        """Refuse an evaluation in which the classifiers with these suffixes have values that are not finite.

        Raises:
            DivergenceError: If there is one.
        """
        for suffix in sorted(suffixes, key=lambda suffix: suffix != "_original"):  # the cause of the others
            who = "the original's" if suffix == "_original" else "the network's"
            fit = self.trainer.state.fn == "fit" and suffix != "_original"
            advice = f"the fit has diverged; {ADVICE}" if fit else "pass another checkpoint"
            raise DivergenceError(
                f"{who} weights or logits on the {stage} images are not finite, so the accuracy is undefined: {advice}."
            )

    def log_results(self, stage: str, results: Mapping[str, Tensor]) -> None:
        """Log the metrics of an evaluation, which are equal on all processes; a loaded checkpoint's with its step."""
        command = self.trainer.state.fn
        logger = command == "fit" or self.logs_evaluations
        with warnings.catch_warnings():
            # A trainer without loggers is no mistake, and only what goes to them is returned by `validate` and `test`.
            warnings.filterwarnings("ignore", message=".*but have no logger configured")
            for name, value in results.items():
                self.log(f"{stage}/{name}", value, prog_bar=name == "acc", sync_dist=True, logger=logger)
        if command == "test":
            self.log("step", float(self.fitted_steps), sync_dist=True)  # Lightning takes it for the x axis

    def planned_steps(self) -> int:
        """Steps that the optimizer will make.

        Raises:
            UsageError: If nothing ends the run, or its end is not known.
        """
        steps = total_steps(self.trainer)
        if steps == math.inf:
            is_endless = self.trainer.max_epochs == -1
            reason = "is unlimited" if is_endless else "is not known (the training data loader has no length)"
            option = "--trainer.max_epochs or --trainer.max_steps" if is_endless else "--trainer.max_steps"
            raise UsageError(
                f"the number of training steps {reason}, but the optimizer or schedule needs it; pass {option}."
            )
        return int(steps)

    def build(
        self, make_optimizer: OptimizerCallable, make_scheduler: LRSchedulerCallable | None, options: str
    ) -> tuple[Optimizer, dict[str, Any] | None]:
        """An optimizer of the trained parameters, and Lightning's description of its schedule.

        Args:
            make_optimizer: Creates the optimizer.
            make_scheduler: Creates the schedule.
            options: Prefix of their options on the command line, for messages.

        Raises:
            UsageError: If their options are invalid.
        """
        ratios = self.lr_multipliers()
        parameters = {parameter: ratios.get(parameter, 1.0) for parameter in self.trained_parameters()}
        optimizer = build_optimizer(make_optimizer, parameters, options)
        if make_scheduler and getattr(optimizer, "schedules_itself", False):
            raise UsageError(
                f"{type(optimizer).__name__} schedules its learning rate itself; pass {options}.scheduler null."
            )
        return optimizer, build_schedule(make_scheduler, optimizer, self.trainer, options) if make_scheduler else None

    def configure_optimizers(self) -> Any:
        plan = Plan.from_trainer(self.trainer, self._data)
        # By now the data is set up, and the number of steps known.
        self.check_plan(replace(plan, most_steps=total_steps(self.trainer)), self)
        before, self._resumed_epoch_steps = self._resumed_epoch_steps, None
        if before not in (None, self._epoch_steps) and (self.trainer.max_epochs or 0) > 0:
            raise UsageError(
                f"an epoch of the checkpoint's fit had {before} optimizer steps, one of this fit has "
                f"{self._epoch_steps}; pass the same batch size, --data.steps_per_epoch, number of processes and "
                "--trainer.accumulate_grad_batches, or start a new fit from its weights (--model.init_from)."
            )
        optimizer, described = self.build(*self.optimizer_factories(), self.optimizer_options)
        schedule = described["scheduler"] if described else None
        for thing in (optimizer, schedule):
            if isinstance(thing, NeedsTotalSteps):
                thing.set_total_steps(self.planned_steps())
        if isinstance(schedule, OneCycleLR) and schedule.total_steps < (planned := self.planned_steps()):
            raise UsageError(
                f"{self.optimizer_options}.scheduler.total_steps={schedule.total_steps}, but the fit has {planned} "
                "steps; pass at least so many."
            )
        return optimizer if described is None else {"optimizer": optimizer, "lr_scheduler": described}

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        try:
            super().lr_scheduler_step(scheduler, metric)
        except (ArithmeticError, TypeError, ValueError) as error:  # of options that are no numbers, or 0
            reason = " ".join(str(error).split())
            raise UsageError(
                f"{self.optimizer_options}.scheduler {type(scheduler).__name__} fails after step "
                f"{self.trainer.global_step}: {reason}; check its options."
            ) from error
