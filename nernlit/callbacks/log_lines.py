"""Progress of a run: lines in a log file."""

import time
from collections.abc import Mapping, Sequence
from typing import Any, final

import lightning as L
from lightning.pytorch.utilities import rank_zero_only

from nernlit.callbacks.pace import Pace, round_of
from nernlit.utilities.progress import DELAY_SECONDS, clock

#: Logged metric -> its format, the most important one first.
_TRAINED = {"train/loss": "loss {:.4g}"}
_VALIDATED = {
    "val/acc": "accuracy {:.2%}",
    "val/acc_original": "original {:.2%}",
    "val/explained_power": "explained power {:.2%}",
    "val/recon_rmse": "RMSE {:.5f}",
    **_TRAINED,
}
_SECONDS_BETWEEN_LINES = 60.0


@final
class ValidationLog(L.Callback):
    """Prints lines for log files: one per validation of a fit, and one per minute between them and of an evaluation."""

    @rank_zero_only
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._pace, self._next = Pace(trainer), time.monotonic() + _SECONDS_BETWEEN_LINES

    @rank_zero_only
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if time.monotonic() >= self._next:
            self._show_fit(pl_module, _TRAINED)

    @rank_zero_only
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        self._show_fit(pl_module, _VALIDATED)

    def _show_fit(self, pl_module: L.LightningModule, figures: Mapping[str, str]) -> None:
        pace, metrics = self._pace, pl_module.trainer.callback_metrics
        shown = [form.format(float(metrics[name])) for name, form in figures.items() if name in metrics]
        parts = [f"step {pl_module.trainer.global_step}" + (f" of {pace.total}" if pace.total else "")]
        parts += [round_of(pl_module), clock(pace.seconds), *shown, f"{pace.per_second:.3g} steps/s", pace.left]
        print(", ".join(filter(None, parts)), flush=True)
        self._next = time.monotonic() + _SECONDS_BETWEEN_LINES

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn != "fit":
            self._start(trainer.num_val_batches)

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._start(trainer.num_test_batches)

    def _start(self, batches: Sequence[int | float]) -> None:
        self._done, self._batches, self._began = 0, sum(batches), time.monotonic()
        self._next = self._began + DELAY_SECONDS

    @rank_zero_only
    def _count_batch(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if trainer.state.fn == "fit":
            return
        self._done += 1
        now = time.monotonic()
        if now >= self._next:
            self._next = now + _SECONDS_BETWEEN_LINES
            seconds = now - self._began
            left = clock(seconds / self._done * (self._batches - self._done))
            what = str(trainer.state.fn.value)  # type: ignore[union-attr]  # it is set while a command runs
            print(f"{what}: batch {self._done:,} of {self._batches:,}, {clock(seconds)}, {left} left", flush=True)

    on_validation_batch_end = on_test_batch_end = _count_batch
