"""Schemes of several stages in one fit: each stage has an optimiser and a schedule of its own."""

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

from nernlit.modules.base import ReconstructionModule


class StagedModule(ReconstructionModule, ABC):
    """A scheme whose optimiser starts anew at given steps.

    Which stage a step belongs to is a function of its number, and checkpoints say which stage's optimiser they hold: a
    fit can be resumed in any stage.
    """

    stage: int = 0

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

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["stage"] = self.stage

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.stage = checkpoint["stage"]
