"""Schemes of several stages in one fit: each stage has an optimizer and a schedule of its own."""

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

from nernlit.errors import UsageError
from nernlit.training.base import ReconstructionModule


class StagedModule(ReconstructionModule, ABC):
    """A scheme whose optimizer starts anew at given steps.

    Which stage a step belongs to is a function of its number, and checkpoints say which stage's optimizer they hold: a
    fit can be resumed in any stage.
    """

    stage: int = 0
    #: The step and the stages' ends of the checkpoint that a fit goes on from.
    _resumed: tuple[int, list[float]] | None = None

    @abstractmethod
    def stage_starts(self) -> Sequence[int]:
        """The optimizer steps at which stages 1, 2, ... begin; stage 0 begins at step 0."""

    def start_stage(self) -> None:
        """Prepare for `self.stage`, before its optimizer is made. Nothing by default."""

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
            self._refuse_other_stages(*self._resumed)
            self._resumed = None
        return super().configure_optimizers()

    def _stage_ends(self) -> list[float]:
        total = self.trainer.estimated_stepping_batches  # loads the data, on which the stages' lengths may depend
        return [*self.stage_starts(), total]

    def _refuse_other_stages(self, step: int, before: list[float]) -> None:
        """What is over stays over: a resumed fit neither redoes a part of it nor cuts the running stage short."""
        now, over = self._stage_ends(), self.stage
        if len(now) <= over or now[:over] != before[:over] or (now[over] != before[over] and now[over] <= step):
            raise UsageError(
                f"the checkpoint is from step {step} of a fit whose stages end after the steps {before}; with the "
                f"options of this one they end after {now}. Resume with the lengths that it was fitted with "
                f"(--trainer.max_epochs and those of {type(self).__name__}), or start anew from its weights "
                "(--model.init_from)."
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["stage"] = self.stage
        if self.trainer.state.fn == "fit":
            checkpoint["stage_ends"] = self._stage_ends()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.stage = checkpoint["stage"]
        if "stage_ends" in checkpoint:
            self._resumed = checkpoint["global_step"], checkpoint["stage_ends"]
