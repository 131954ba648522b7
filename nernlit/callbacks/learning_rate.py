"""Logging the learning rate."""

from typing import Any, final

import lightning as L
from lightning.pytorch.utilities import rank_zero_only


@final
class LearningRate(L.Callback):
    """Log the learning rate of each step as `lr`, and of further parameter groups as `lr_group_1`, `lr_group_2`, ...

    Lightning's `LearningRateMonitor` uses the optimizer's class in the name, so that different optimizers cannot be
    compared in one chart. After a restart (`on_divergence: restart`) the reduced rates are logged.
    """

    @rank_zero_only
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if batch_idx % trainer.accumulate_grad_batches:
            return  # a step has several batches
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # set by a connector
        if trainer.optimizers and every and (step == 0 or (step + 1) % every == 0):
            groups = trainer.optimizers[0].param_groups
            factor = getattr(pl_module, "lr_factor", 1.0)
            rates = {
                f"lr_group_{number}" if number else "lr": factor * float(group["lr"]) * group.get("lr_ratio", 1.0)
                for number, group in enumerate(groups)
            }
            for logger in trainer.loggers:
                logger.log_metrics(rates, step)
