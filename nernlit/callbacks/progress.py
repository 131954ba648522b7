"""Progress of a run: one line in a terminal."""

import time
from collections.abc import Sequence
from typing import Any, final

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Column
from rich.text import Text

from nernlit.callbacks.pace import Pace, round_of
from nernlit.utilities.progress import CONSOLE, clock

#: Logged metric -> its format, the most important one first.
_FIGURES = {
    "val/acc": "acc {:.2%}",
    "train/explained_power": "explained {:.2%}",
    "train/loss": "loss {:.4g}",
}
_SECONDS_BETWEEN_UPDATES = 0.2


class _OneLine(ProgressColumn):
    """A task's text, cropped at the edge of the terminal instead of wrapped."""

    def render(self, task: Task) -> Text:
        return Text(task.fields["figures"], no_wrap=True, overflow="crop")

    def get_table_column(self) -> Column:
        return Column(no_wrap=True)


@final
class ProgressLine(ProgressBar):
    """One line in a terminal: steps done, steps per second, time left, and the main metrics.

    Metrics are read only a few times per second, because reading one waits for the device.
    """

    def __init__(self) -> None:
        super().__init__()
        self._enabled = True
        self._progress: Progress | None = None

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def _start(self, what: str, total: float | None) -> None:
        if not self._enabled or self._progress is not None:
            return
        columns = TextColumn("{task.description}"), BarColumn(bar_width=8), _OneLine()
        self._progress = Progress(*columns, console=CONSOLE, transient=self.trainer.sanity_checking)
        self._task = self._progress.add_task(what, total=None if total == float("inf") else total, figures="")
        self._shown_at = 0.0
        self._progress.start()

    def _show(self, what: str, done: int, figures: str) -> None:
        if self._progress is not None:
            self._progress.update(self._task, description=what, completed=done, figures=figures)
            self._shown_at = time.monotonic()

    def _stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    @property
    def _is_due(self) -> bool:
        return self._progress is not None and time.monotonic() - self._shown_at > _SECONDS_BETWEEN_UPDATES

    def _show_fit(self, pl_module: L.LightningModule, validates: bool = False) -> None:
        if self._progress is None:
            return
        what = "validation" if validates else round_of(pl_module) or "fit"
        pace, metrics = self._pace, self.trainer.callback_metrics
        figures = [form.format(float(metrics[name])) for name, form in _FIGURES.items() if name in metrics]
        steps = f"{self.trainer.global_step}/{pace.total or '?'}"
        rate = f"{pace.per_second:.3g}/s" if pace.per_second else ""
        line = ""
        room = CONSOLE.width - len(what) - 10
        for part in (steps, rate, pace.left, *figures):
            if part and len(line) + len(part) < room:
                line += f"{part}  "
        self._show(what, self.trainer.global_step, line)

    def on_sanity_check_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._stop()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._pace = Pace(trainer)
        self._start("fit", self._pace.total)
        self._show_fit(pl_module)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._is_due:
            self._show_fit(pl_module)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking:
            self._start_evaluation("validation check", trainer.num_sanity_val_batches)
        elif trainer.state.fn == "fit":
            self._show_fit(pl_module, validates=True)
        else:
            self._start_evaluation("validation", trainer.num_val_batches)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._show_fit(pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._show_fit(pl_module)
        self._stop()

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._start_evaluation("test", trainer.num_test_batches)

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._start_evaluation("predict", trainer.num_predict_batches)

    def _start_evaluation(self, what: str, batches: int | float | Sequence[int | float]) -> None:
        self._evaluated = 0
        self._start(what, sum(batches) if isinstance(batches, Sequence) else batches)

    def _count_batch(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count a batch of an evaluation; those within a fit are not counted."""
        if self._progress is None or (trainer.state.fn == "fit" and not trainer.sanity_checking):
            return
        self._evaluated += 1
        task = self._progress.tasks[0]
        of = "" if task.total is None else f"/{task.total:.0f}"
        self._show(task.description, self._evaluated, f"batch {self._evaluated}{of}  {clock(task.elapsed or 0)}")

    on_validation_batch_end = on_test_batch_end = on_predict_batch_end = _count_batch

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == "validate":
            self._stop()

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._stop()

    def on_predict_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._stop()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._stop()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._stop()
