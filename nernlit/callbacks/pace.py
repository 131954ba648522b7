"""Speed and remaining time of a fit, for the progress line and the log."""

import time
from typing import final

import lightning as L

from nernlit.utilities.progress import clock


@final
class Pace:
    """Speed and remaining time of a fit, since this process started it."""

    def __init__(self, trainer: L.Trainer) -> None:
        self.began, self.first = time.monotonic(), trainer.global_step
        planned = trainer.estimated_stepping_batches
        self.total = int(planned) if 0 <= planned < float("inf") else None  # -1: a loader without a length
        self.trainer = trainer

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    @property
    def per_second(self) -> float:
        """Steps per second, including the time of validations."""
        return (self.trainer.global_step - self.first) / max(self.seconds, 1e-9)

    @property
    def left(self) -> str:
        """Estimated time to the last planned step."""
        if self.total is None or not self.per_second:
            return ""
        return f"{clock(max(0, self.total - self.trainer.global_step) / self.per_second)} left"


def round_of(pl_module: L.LightningModule) -> str:
    """The current round of `Progressive`; empty for other schemes."""
    return f"round {pl_module.round}/{pl_module.rounds}" if hasattr(pl_module, "round") else ""
