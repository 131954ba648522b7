"""The base of every LightningModule here: the hooks for training, evaluation and the optimizer's set-up.

Metrics are `stage/quantity[_condition]`.
"""

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

from nernlit.errors import DivergenceError, UsageError
from nernlit.optimizers import NeedsTotalSteps
from nernlit.originals import Original
from nernlit.training.divergence import ADVICE, LossWatch, not_finite
from nernlit.training.evaluation import Evaluation, ImageBatch
from nernlit.training.optimization import built_optimizer, built_schedule
from nernlit.training.plan import Plan


class ClassifierModule(L.LightningModule, ABC):
    """Accuracy of one or more classifiers on the same images, and the optimizer's set-up.

    Args:
        original: Says how many classes and image channels there are.
    """

    def __init__(self, original: Original) -> None:
        super().__init__()
        self.num_classes, self.in_chans = original.num_classes, original.in_chans
        self.fitted_steps = 0  # of the checkpoint that was loaded
        #: Hyperparameters that checkpoints hold in place of the given ones.
        self.replaced_hyperparameters: dict[str, Any] = {}

    @abstractmethod
    def loss_terms(self, batch: ImageBatch) -> dict[str, Tensor]:
        """The scheme: its weighted loss terms by name. The step minimizes their sum."""

    @abstractmethod
    def trained_parameters(self) -> Iterable[Parameter]:
        """What the optimizer moves."""

    @abstractmethod
    def makers(self) -> tuple[OptimizerCallable, LRSchedulerCallable | None]:
        """What makes the optimizer and its schedule, which is stepped once per optimizer step."""

    @abstractmethod
    def classifiers(self, stage: str) -> dict[str, Callable[[Tensor], Tensor]]:
        """What `val` or `test` measures: the suffix of its metrics' names -> pixels to logits."""

    def finite_weights(self) -> dict[str, Tensor]:
        """Whether the weights of the classifiers are finite, of those whose weights are predicted."""
        return {}

    @property
    @abstractmethod
    def is_trained(self) -> bool:
        """Whether an evaluation makes sense before a checkpoint is loaded."""

    @abstractmethod
    def network(self) -> tuple[str, dict[str, Tensor]]:
        """The network that the module stands for: its timm name and its state dict."""

    def needs_images(self, stage: str) -> bool:
        """Whether `fit`, `validate`, `test` or `predict` cannot do without images."""
        return False

    def setup(self, stage: str) -> None:
        if not self._has_images and self.needs_images(stage):
            what = getattr(stage, "value", stage)  # Lightning's is an enumeration
            raise UsageError(
                f"{type(self).__name__} needs images to {what}, and there are none (`data: null`); "
                "name the data (--data CLASS and its options)."
            )

    #: Precisions of the trainer (`--trainer.precision`) that the module works in.
    precisions: tuple[str, ...] = ("32-true",)

    @classmethod
    def check_plan(cls, plan: Plan, options: Any) -> None:
        """Refuse a fit whose length does not suit the scheme. Nothing by default.

        Args:
            plan: The fit's length, as far as it is known.
            options: The module, or the options that it would be built from; read by attribute.

        Raises:
            UsageError: If the scheme cannot do what it is for in this length.
        """

    def configure_callbacks(self) -> Any:
        """Lightning's first hook of a run: what cannot work is refused before any data is read."""
        precision = self.trainer.precision
        if precision not in self.precisions:
            half = "; --model.precision bf16 runs training steps in it" if "bf16" in precision else ""
            raise UsageError(
                f"--trainer.precision {precision}: {type(self).__name__} works in {', '.join(self.precisions)}{half}."
            )
        if self.trainer.state.fn == "fit":
            self.check_plan(Plan.of(self.trainer, self._data), self)
        return super().configure_callbacks()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """A fit ends with a validation, whatever ends it: max_epochs, max_steps, max_time or a callback."""
        trainer = self.trainer
        over = trainer.is_last_batch and trainer.current_epoch + 1 == trainer.max_epochs
        if over or trainer.global_step == trainer.max_steps:
            trainer.should_stop = True
        if trainer.should_stop and trainer.check_val_every_n_epoch:
            trainer.check_val_every_n_epoch = 1

    def on_fit_start(self) -> None:
        self._check_val_every_n_epoch = self.trainer.check_val_every_n_epoch
        at_once = self.device.type == "cpu" and self.trainer.world_size == 1
        self._losses = LossWatch(at_once, self.joined_flags)

    def joined_flags(self, flags: Tensor) -> Tensor:
        """Flags (0 or 1) that are 1 where they are on all processes."""
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
        """The names of the entries of the module's state that are not finite, and ought to be."""
        return not_finite(state)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.trainer.state.fn == "fit":
            self.refuse_divergence()  # a checkpoint that is of no use must not take the place of a good one

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.fitted_steps = int(checkpoint.get("global_step", 0))

    def on_train_end(self) -> None:
        self.trainer.check_val_every_n_epoch = self._check_val_every_n_epoch
        self.refuse_divergence()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        terms = self.loss_terms(batch)
        loss = torch.stack(list(terms.values())).sum()
        self._losses.note(self.trainer.global_step, self.trainer.optimizers[0].param_groups[0]["lr"], terms)
        self.log_dict({f"train/{name}": term.detach() for name, term in terms.items()}, sync_dist=True)
        self.log("train/loss", loss.detach(), prog_bar=True, sync_dist=True)
        return loss

    def on_validation_epoch_start(self) -> None:
        self._start_evaluation("val")

    def on_test_epoch_start(self) -> None:
        self._start_evaluation("test")

    def validation_step(self, batch: ImageBatch, batch_idx: int) -> None:
        self._evaluation.update(batch)

    def test_step(self, batch: ImageBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._evaluation.update(batch, dataloader_idx)

    def on_validation_epoch_end(self) -> None:
        self._report("val")

    def on_test_epoch_end(self) -> None:
        self._report("test")

    def predict_step(self, batch: Any, batch_idx: int) -> tuple[str, dict[str, Tensor]]:
        """The network's timm name and state dict, whatever the batch; the command line writes it to a file."""
        name, state = self.network()
        if diverged := not_finite(state):
            raise DivergenceError(f"{diverged[0]} holds numbers that are not finite; pass another checkpoint.")
        return name, state

    def _start_evaluation(self, stage: str) -> None:
        if self.trainer.state.fn == "fit" and not self.trainer.sanity_checking:
            self.refuse_divergence()
        classifiers = self.classifiers(stage)
        self._finite = self.finite_weights()
        # Evaluation sets beside the dataset's own, whatever the data calls them.
        conditions = list(getattr(self._data, "conditions", [])) if stage == "test" else []
        self._evaluation = Evaluation(
            classifiers if self._has_images else {}, self.num_classes, self.in_chans, conditions, self.device
        )

    @property
    def _has_images(self) -> bool:
        return getattr(self._data, "has_images", True)

    @property
    def _data(self) -> Any:
        return getattr(self.trainer, "datamodule", None)

    def _report(self, stage: str) -> None:
        evaluation = self._evaluation
        suffixes = list(evaluation.classifiers or self._finite)  # without images, the weights alone
        unseen = torch.ones((), dtype=torch.bool, device=self.device)  # a process may have got no image
        flags_S2 = torch.stack(
            [
                torch.stack([found.get(suffix, unseen).int() for found in (self._finite, evaluation.answered)])
                for suffix in suffixes
            ]
        )
        flags = dict(zip(suffixes, self.joined_flags(flags_S2).tolist(), strict=True))
        unusable = [suffix for suffix, (finite, answered) in flags.items() if not (finite and answered)]
        # A network may overflow on its way to a good one; what a fit ends with, and what is measured alone, may not.
        on_the_way = self.trainer.state.fn == "fit" and not self.trainer.should_stop
        self.refuse_unusable(stage, [s for s in unusable if not (on_the_way and flags[s][0])])
        self.log_results(stage, evaluation.results(self.measured(evaluation.classifiers, unusable)))

    def measured(self, suffixes: Iterable[str], unusable: Sequence[str]) -> list[str]:
        """The classifiers whose figures are reported; some are unusable: they gave numbers that are not finite."""
        if unusable and not self.trainer.sanity_checking:
            rank_zero_warn(
                f"After step {self.trainer.global_step - 1} the network's logits are not finite for some validation "
                "images, which count as wrong. If this does not pass, lower the learning rate (the optimizer's lr)."
            )
        return list(suffixes)

    def refuse_unusable(self, stage: str, suffixes: Sequence[str]) -> None:
        """Refuse an evaluation in which the classifiers of these suffixes gave numbers that are not finite.

        Raises:
            DivergenceError: If there is one.
        """
        for suffix in suffixes:
            who = "the original's" if suffix == "_original" else "the network's"
            fit = self.trainer.state.fn == "fit" and suffix != "_original"
            advice = f"the fit has diverged; {ADVICE}" if fit else "pass another checkpoint"
            raise DivergenceError(
                f"{who} weights or logits on the {stage} images are not finite numbers, so that there is no accuracy: "
                f"{advice}."
            )

    def log_results(self, stage: str, results: Mapping[str, Tensor]) -> None:
        """Log an evaluation's figures; equal on all processes already.

        A loaded checkpoint's are those of its step. The fit has logged them where it validated: `validate` reports them
        without another point in the curves.
        """
        command = self.trainer.state.fn
        for name, value in results.items():
            self.log(f"{stage}/{name}", value, prog_bar=name == "acc", sync_dist=True, logger=command != "validate")
        if command == "test":
            self.log("step", float(self.fitted_steps), sync_dist=True)  # Lightning takes it for the x axis

    def planned_steps(self) -> int:
        """Steps that the optimizer will make.

        Raises:
            UsageError: If nothing ends the run.
        """
        steps = self.trainer.estimated_stepping_batches
        if steps == float("inf"):
            raise UsageError("the run has no end, so its schedule has none; pass --trainer.max_epochs or max_steps.")
        return int(steps)

    def configure_optimizers(self) -> Any:
        plan = Plan.of(self.trainer, self._data)
        # Its data is there by now, and with it the number of steps.
        self.check_plan(replace(plan, most_steps=self.trainer.estimated_stepping_batches), self)
        make_optimizer, make_scheduler = self.makers()
        optimizer = built_optimizer(make_optimizer, self.trained_parameters())
        described = built_schedule(make_scheduler, optimizer, self.trainer) if make_scheduler else None
        for thing in (optimizer, described["scheduler"] if described else None):
            if isinstance(thing, NeedsTotalSteps):
                thing.set_total_steps(self.planned_steps())
        return optimizer if described is None else {"optimizer": optimizer, "lr_scheduler": described}
