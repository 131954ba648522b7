"""Ending a run at a safe point on SIGTERM and SIGINT."""

from pathlib import Path
from typing import Any, final

import lightning as L
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint

from nernlit.utilities.signals import SIGNALS, Interrupted


@final
class Interruption(Checkpoint):
    """End a run on SIGTERM and SIGINT (Ctrl-C), and save a checkpoint of a fit.

    A fit ends after the current training batch, or during a validation, and writes `last.ckpt`; a fit that is resumed
    from it ends bit-identical to an uninterrupted one. `validate`, `test` and `predict` save nothing and end at once.
    The exit code is 143 or 130; a second signal ends the process at once. With several processes all of them end after
    the same batch. Lightning handles SLURM's signals for requeueing.

    It is a `Checkpoint` because Lightning calls those last: the state of the other callbacks belongs to the same step.
    """

    def __init__(self) -> None:
        self._stops = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        SIGNALS.start_anew()
        SIGNALS.forward = getattr(trainer.strategy.launcher, "kill", None)
        self._stops = False

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        SIGNALS.forward = None

    # Lightning installs its own handlers just before these hooks; they end the process anywhere, with exit code 0 or 1.

    def on_sanity_check_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        SIGNALS.listen()

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        SIGNALS.listen()

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        SIGNALS.listen()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        SIGNALS.listen()
        SIGNALS.hold()

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if self._stops:  # a checkpoint was saved after the last batch, and its metrics are logged by now
            raise Interrupted(self._signum)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        if self._asked_to_stop(trainer) and not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            self._save(trainer)
        # After an epoch's last batch a validation or the end of the epoch follows; both are safe points.

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn != "fit":
            SIGNALS.listen()
        elif self._stops:
            raise Interrupted(self._signum)
        elif not trainer.sanity_checking and trainer.world_size == 1:
            SIGNALS.release_for_a_while()

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            SIGNALS.hold()  # callbacks process the results now

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._asked_to_stop(trainer):
            self._save(trainer)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        SIGNALS.release()
        if SIGNALS.received is not None:  # in the last epoch: the fit is complete
            raise Interrupted(SIGNALS.received)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        SIGNALS.release()
        SIGNALS.forward = None
        if not isinstance(exception, Interrupted):
            return
        if trainer.state.fn == "fit" and trainer.validating:
            self._begin_validation_again(trainer)
            self._save(trainer)
        exception.message = self._message(trainer)
        environment = getattr(trainer.strategy, "cluster_environment", None)
        if not trainer.is_global_zero and isinstance(environment, LightningEnvironment):
            exception.code = 0  # otherwise Lightning kills the first process, which started this one

    @property
    def _signum(self) -> int:
        return SIGNALS.received or 15  # None if another process received it

    def _asked_to_stop(self, trainer: L.Trainer) -> bool:
        received = SIGNALS.received is not None
        if trainer.world_size > 1:
            received = trainer.strategy.reduce_boolean_decision(received, all=False)
        self._stops |= received
        return self._stops

    @staticmethod
    def _begin_validation_again(trainer: L.Trainer) -> None:
        """Set the state of the loops to the beginning of the validation's first batch.

        Resuming then repeats the whole validation. From a state within the validation, Lightning would evaluate only
        the remaining batches, or skip the validation. There is no public interface for this.
        """
        progress = trainer.fit_loop.epoch_loop.val_loop.batch_progress
        progress.reset()
        progress.increment_ready()
        progress.increment_started()

    @staticmethod
    def _file(trainer: L.Trainer) -> Path | None:
        """The path of this run's last checkpoint; None if it saves none."""
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.dirpath:
                return Path(callback.dirpath, "last.ckpt")
        return None

    def _save(self, trainer: L.Trainer) -> None:
        file = self._file(trainer)
        if file is not None:
            trainer.save_checkpoint(file)

    def _message(self, trainer: L.Trainer) -> str:
        if not trainer.is_global_zero:
            return ""
        command = trainer.state.fn.value if trainer.state.fn else "the run"
        if command != "fit":
            return f"{command} was interrupted"
        file = self._file(trainer)
        if file is None or not file.is_file():
            return f"interrupted at step {trainer.global_step}; no checkpoint was written"
        return f"interrupted at step {trainer.global_step}; go on with --ckpt_path last"
