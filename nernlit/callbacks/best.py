"""The best checkpoint of a fit."""

from typing import Any, final

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor


@final
class BestCheckpoint(ModelCheckpoint):
    """A `ModelCheckpoint` that keeps the best validation accuracy; of equal ones, the later.

    Lightning keeps the earlier one. On a few hundred images ties are common, and longer training reconstructs better.

    Args:
        kwargs: See `ModelCheckpoint`.
    """

    def __init__(
        self, filename: str | None = "best", monitor: str | None = "val/acc", mode: str = "max", **kwargs: Any
    ) -> None:
        super().__init__(filename=filename, monitor=monitor, mode=mode, **kwargs)

    def check_monitor_top_k(self, trainer: L.Trainer, current: Tensor | None = None) -> bool:
        if current is not None and self.best_model_score is not None and current == self.best_model_score:
            return self.save_top_k != 0
        return super().check_monitor_top_k(trainer, current)
