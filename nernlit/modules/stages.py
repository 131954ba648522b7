"""Schemes of several stages in one fit: each stage has an optimiser and a schedule of its own."""

import math
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

from nernlit.errors import UsageError
from nernlit.modules.base import ReconstructionModule


class StagedModule(ReconstructionModule, ABC):
    """A scheme whose optimiser starts anew at given steps.

    Which stage a step belongs to is a function of its number, and checkpoints say which stage's optimiser they hold: a
    fit can be resumed in any stage.
    """

    stage: int = 0
    #: The step and the stages' starts of the checkpoint that a fit goes on from.
    _resumed: tuple[int, list[int]] | None = None

    @abstractmethod
    def stage_starts(self) -> Sequence[int]:
        """The optimiser steps at which stages 1, 2, ... begin; stage 0 begins at step 0."""

    def start_stage(self) -> None:
        """Prepare for `self.stage`, before its optimiser is made. Nothing by default."""

    def planned_steps(self) -> int:
        """Steps of the stage."""
        total = super().planned_steps()
        starts = [0, *self.stage_starts()]
        ends = [*starts[1:], max(total, starts[-1] + 1)]
        return ends[self.stage] - starts[self.stage]

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        stage = bisect_right(self.stage_starts(), self.trainer.global_step)
        if stage != self.stage:
            self.stage = stage
            self.start_stage()
            self.trainer.strategy.setup_optimizers(self.trainer)

    def configure_optimizers(self) -> Any:
        if self._resumed is not None:
            _ = self.trainer.estimated_stepping_batches  # reads the data, whose length stages may depend on
            self._refuse_other_stages(*self._resumed)
            self._resumed = None
        return super().configure_optimizers()

    def _refuse_other_stages(self, step: int, before: list[int]) -> None:
        """What is over stays over: a resumed fit neither redoes a part of it nor cuts the running stage short."""
        now, over = list(self.stage_starts()), self.stage
        end, end_before = ([*starts, math.inf][min(over, len(starts))] for starts in (now, before))
        if now[:over] != before[:over] or (end != end_before and end <= step):
            raise UsageError(
                f"the checkpoint is from step {step} of a fit whose stages begin at the steps {[0, *before]}; with the "
                f"options of this one they begin at {[0, *now]}. Resume with the lengths that it was fitted with "
                f"(--trainer.max_epochs and those of {type(self).__name__}), or start anew from its weights "
                "(--model.init_from)."
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["stage"] = self.stage
        checkpoint["stage_starts"] = list(self.stage_starts())

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.stage = checkpoint["stage"]
        if "stage_starts" in checkpoint:
            self._resumed = checkpoint["global_step"], checkpoint["stage_starts"]
