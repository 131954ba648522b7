"""The planned length of a fit, as far as it is known from the options before any data is read."""

import math
from dataclasses import dataclass
from typing import Any

from nernlit.errors import UsageError


def total_steps(trainer: Any) -> float:
    """Optimizer steps of a fit; infinite where nothing ends it, or the training loader has no length.

    Raises:
        UsageError: If the training loader is empty.
    """
    steps: float = trainer.estimated_stepping_batches  # loads the data
    if steps == 0:
        raise UsageError("the training data loader has no batches, so the fit would make no step; check the data.")
    return math.inf if steps < 0 else steps


@dataclass(frozen=True)
class Plan:
    """The length of a fit.

    Attributes:
        max_epochs: Epochs; None where only steps limit the fit.
        check_val_every_n_epoch: Epochs between validations.
        most_steps: Optimizer steps at most; infinite where that depends on the data.
        is_trial: Whether it is Lightning's `fast_dev_run`, which tries a few batches and may end anywhere.
    """

    max_epochs: int | None
    check_val_every_n_epoch: int
    most_steps: float
    is_trial: bool = False

    @classmethod
    def from_trainer(cls, trainer: Any, data: Any) -> "Plan":
        """Read the plan from a trainer and a data module, or from their options (all are read by attribute).

        Raises:
            UsageError: If the fit would make no step, `steps_per_epoch` has no effect, or an epoch has fewer batches
                than `val_check_interval`.
        """
        train_on, batches = getattr(data, "train_on", None), getattr(data, "steps_per_epoch", None)
        if train_on == "images" and batches is not None:
            raise UsageError(
                f"--data.steps_per_epoch {batches} has no effect with --data.train_on images, where an epoch is a pass "
                "over the images; leave it out, or set it to null. --trainer.limit_train_batches N shortens epochs."
            )
        for name in ("max_epochs", "max_steps", "limit_train_batches"):
            if getattr(trainer, name) == 0:
                raise UsageError(f"--trainer.{name} 0: the fit would make no step; leave it out, or pass more.")
        if trainer.accumulate_grad_batches < 1:
            raise UsageError(
                f"--trainer.accumulate_grad_batches {trainer.accumulate_grad_batches}; expected at least 1."
            )
        for name in ("check_val_every_n_epoch", "val_check_interval"):
            if getattr(trainer, name, None) == 0:
                raise UsageError(f"--trainer.{name} 0; for no validation pass --trainer.limit_val_batches 0.")
        interval = getattr(trainer, "val_check_interval", None)
        if isinstance(interval, int) and batches is not None and trainer.check_val_every_n_epoch and interval > batches:
            raise UsageError(
                f"--trainer.val_check_interval {interval} is more than the {batches} batches of an epoch; pass fewer, "
                "or --trainer.check_val_every_n_epoch null to count batches over all epochs."
            )
        epochs, steps = trainer.max_epochs, trainer.max_steps
        epochs = None if epochs is None or epochs < 0 else epochs
        most = math.inf if steps is None or steps < 0 else float(steps)
        if epochs is not None and train_on is not None and batches is not None:
            limit = 1.0 if trainer.limit_train_batches is None else trainer.limit_train_batches
            batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
            most = min(most, epochs * math.ceil(batches / trainer.accumulate_grad_batches))
        return cls(epochs, trainer.check_val_every_n_epoch or 1, most, bool(trainer.fast_dev_run))
