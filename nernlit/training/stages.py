"""Stages of a fit: where they begin, and a check of their lengths when a fit is resumed."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable

from nernlit.errors import UsageError
from nernlit.training.objectives import Objective


@dataclass(frozen=True)
class Stage:
    """A part of a fit with its own optimizer.

    Attributes:
        objective: The objective that its steps minimize.
        optimizer: Creates its optimizer from the trained parameters.
        scheduler: Creates its learning-rate schedule from the optimizer.
        steps: Optimizer steps; None for the rest of the fit.
        options: Prefix of the optimizer's options on the command line, for messages.
    """

    objective: Objective
    optimizer: OptimizerCallable
    scheduler: LRSchedulerCallable | None = None
    steps: int | None = None
    options: str = "--model"


def starts_of(stages: Sequence[Stage]) -> list[int]:
    """The optimizer steps at which stages 1, 2, ... begin; stage 0 begins at step 0."""
    return list(accumulate(stage.steps or 0 for stage in stages[:-1]))


def refuse_other_lengths(scheme: str, stage: int, step: int, before: Sequence[float], now: Sequence[float]) -> None:
    """Refuse to resume a fit with stage lengths that would repeat a finished stage or end the current one in the past.

    Args:
        scheme: Name of the scheme's class.
        stage: Number of the running stage.
        step: Optimizer steps that the fit has made.
        before: The step at which each stage ends, by the options of the fit's start.
        now: The same, by the options it is resumed with.

    Raises:
        UsageError: If so; the message shows both lists.
    """
    is_same = len(now) > stage and now[:stage] == before[:stage]
    if is_same and (now[stage] == before[stage] or now[stage] > step):
        return
    raise UsageError(
        f"the checkpoint is from step {step} of a fit whose stages end after the steps {before}; with the options of "
        f"this one they end after {now}. Resume with the lengths that it was fitted with (--trainer.max_epochs and "
        f"those of {scheme}), or start a new fit from its weights (--model.init_from)."
    )
