"""The number of CPU threads of a run: fixed, or adapted to the cores that other programs leave free."""

import math
import time
from typing import Any, Literal, final

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from nernlit.errors import UsageError
from nernlit.utilities.cpu import OtherPrograms, most_threads, other_programs

#: Consecutive windows in which a core must be free before another thread is used: the other program may only pause.
_QUIET_WINDOWS = 5
_SLOWDOWN = 10.0


@final
class CpuThreads(L.Callback):
    """Use a fixed number of threads, or as many as other programs leave cores free, and report changes.

    Results depend on the number of threads in their last bits. On a machine without other programs `auto` always uses
    all threads, and runs are bit-reproducible; a fixed number makes them so on a busy machine too. Checkpoints contain
    the number, and a resumed fit starts with it. It is logged as `threads` whenever it changes.

    `auto` does nothing with several processes, among which Lightning divides the cores, and on accelerators.

    Args:
        threads: The number of threads, or `auto`.
        window_s: Seconds over which the use of the CPU is measured.
        others: Measures how many cores other programs use.
    """

    def __init__(
        self,
        threads: int | Literal["auto"] = "auto",
        window_s: float = 2.0,
        others: OtherPrograms = other_programs,
    ) -> None:
        if threads != "auto" and threads < 1:
            raise UsageError(f"threads={threads}; expected at least 1, or auto.")
        self.threads, self.window_s, self._others = threads, window_s, others
        self._most = self._before = torch.get_num_threads()
        self._adapts = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._most, self._before = most_threads(), torch.get_num_threads()
        self._adapts = self.threads == "auto" and trainer.world_size == 1 and trainer.strategy.root_device.type == "cpu"
        if self.threads != "auto":
            torch.set_num_threads(self.threads)
        elif self._adapts:
            torch.set_num_threads(self._others.free_threads(self._most))
            self._report_threads()
        self._window_began = time.monotonic()
        self._quiet = 0
        self._seconds, self._steps, self._warned = 0.0, 0, False
        #: Loss terms of the measured steps; steps with different terms take different times.
        self._terms: tuple[str, ...] = ()
        self._fastest = math.inf  # smallest seconds per step

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        torch.set_num_threads(self._before)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        torch.set_num_threads(self._before)  # Lightning does not call `teardown`

    def state_dict(self) -> dict[str, Any]:
        return {"threads": torch.get_num_threads()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._adapts:
            torch.set_num_threads(min(self._most, int(state_dict["threads"])))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._log(trainer)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self._step_began = time.monotonic()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        terms = getattr(pl_module, "term_names", ())
        if terms != self._terms:
            self._terms, self._fastest = terms, math.inf
            self._seconds, self._steps = 0.0, 0
        self._seconds += time.monotonic() - self._step_began
        self._steps += 1
        if self._window_is_over():
            changed = self._adapt()
            self._look_at_speed()
            if changed:
                self._log(trainer)

    def on_validation_batch_end(self, *_: Any) -> None:
        self._adapt_between()

    def on_test_batch_end(self, *_: Any) -> None:
        self._adapt_between()

    @staticmethod
    def _log(trainer: L.Trainer) -> None:
        for logger in trainer.loggers:
            logger.log_metrics({"threads": torch.get_num_threads()}, trainer.global_step)

    def _adapt_between(self) -> None:
        if self._window_is_over():
            self._adapt()

    def _window_is_over(self) -> bool:
        now = time.monotonic()
        if now - self._window_began < self.window_s:
            return False
        self._window_began = now
        return True

    def _adapt(self) -> bool:
        """Change the number of threads if necessary; return whether it changed."""
        free = self._others.free_threads(self._most)
        if not self._adapts:
            return False
        used = torch.get_num_threads()
        self._quiet = self._quiet + 1 if free > used else 0
        if free < used or self._quiet >= _QUIET_WINDOWS:
            torch.set_num_threads(free)
            self._quiet = 0
            self._report_threads()
            return True
        return False

    def _report_threads(self) -> None:
        used = torch.get_num_threads()
        if used < self._most:
            rank_zero_info(
                f"Other programs use {self._others.cores():.1f} of {len(self._others.allowed)} cores: continuing with "
                f"{used} of {self._most} threads (--threads {self._most} keeps them all)."
            )

    def _look_at_speed(self) -> None:
        per_step = self._seconds / self._steps
        self._seconds, self._steps = 0.0, 0
        self._fastest = min(per_step, self._fastest)
        others = self._others.cores()
        if per_step > _SLOWDOWN * self._fastest and others >= 0.5 and not self._warned:
            self._warned = True  # once per run
            rank_zero_warn(
                f"Steps have become {per_step / self._fastest:.0f} times slower ({per_step:.3g} s each): other "
                f"programs use {others:.1f} of {len(self._others.allowed)} cores. End them, or run the fit later."
            )
