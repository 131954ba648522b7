"""The learning rate, as a curve beside the losses."""

from typing import Any, final

import lightning as L
from lightning.pytorch.utilities import rank_zero_only


@final
class LearningRate(L.Callback):
    """Log the learning rate of a step as `lr`; further parameter groups are `lr_group_1`, `lr_group_2`, ...

    Lightning's own monitor names it after the optimizer's class, so runs with different optimizers share no curve.
    """

    @rank_zero_only
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # set by a connector
        if trainer.optimizers and (step == 0 or (step + 1) % max(1, every) == 0):
            groups = trainer.optimizers[0].param_groups
            rates = {
                f"lr_group_{number}" if number else "lr": float(group["lr"]) for number, group in enumerate(groups)
            }
            for logger in trainer.loggers:
                logger.log_metrics(rates, step)
