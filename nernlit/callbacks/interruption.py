"""Ending a run at a safe point when the process is told to stop."""

from pathlib import Path
from typing import Any, final

import lightning as L
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint

from nernlit.utilities.signals import SIGNALS, Interrupted


@final
class Interruption(Checkpoint):
    """End a run on SIGTERM and SIGINT (Ctrl-C), and keep what a fit has reached.

    A fit ends after the current training batch, or inside an evaluation, and writes `last.ckpt`: resuming from it gives
    what an uninterrupted fit gives, to the bit. `validate`, `test` and `predict` keep nothing and end at once. The
    process ends with the exit code 143 or 130; a second signal ends it at once. With several processes all of them end
    after the same batch. SLURM's signals for requeueing stay with Lightning.

    The last of the callbacks, as Lightning orders them: what the others keep belongs to the same step.
    """

    def __init__(self) -> None:
        self._stops = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        SIGNALS.start_anew()
        SIGNALS.forward = getattr(trainer.strategy.launcher, "kill", None)
        self._stops = False

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        SIGNALS.forward = None

    # Lightning sets its own handlers just before these; they end the process with 0 or 1, and in between.

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
        if self._stops:  # saved after the last batch, whose metrics are logged by now
            raise Interrupted(self._signum)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        if self._asked_to_stop(trainer) and not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            self._save(trainer)
        # After an epoch's last batch a validation follows, or the epoch's end: both are safe points of their own.

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn != "fit":
            SIGNALS.listen()
        elif self._stops:
            raise Interrupted(self._signum)
        elif not trainer.sanity_checking and trainer.world_size == 1:
            SIGNALS.release_for_a_while()

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            SIGNALS.hold()  # results are taken into account now

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._asked_to_stop(trainer):
            self._save(trainer)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        SIGNALS.release()
        if SIGNALS.received is not None:  # within the last epoch: nothing is left to do
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
            exception.code = 0  # the first process, which started this one, is killed by Lightning otherwise

    @property
    def _signum(self) -> int:
        return SIGNALS.received or 15  # another process received it

    def _asked_to_stop(self, trainer: L.Trainer) -> bool:
        received = SIGNALS.received is not None
        if trainer.world_size > 1:
            received = trainer.strategy.reduce_boolean_decision(received, all=False)
        self._stops |= received
        return self._stops

    @staticmethod
    def _begin_validation_again(trainer: L.Trainer) -> None:
        """Let the loops' state say that the first batch of the validation had begun.

        Lightning then goes on with the whole validation. From the state in between it would evaluate the rest alone,
        or leave the validation out. There is no public interface for it.
        """
        progress = trainer.fit_loop.epoch_loop.val_loop.batch_progress
        progress.reset()
        progress.increment_ready()
        progress.increment_started()

    @staticmethod
    def _file(trainer: L.Trainer) -> Path | None:
        """Where this run's last checkpoint is; None where it keeps none."""
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
