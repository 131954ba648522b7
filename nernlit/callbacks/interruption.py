"""Ending a run at a safe point on SIGTERM and SIGINT."""

import os
import subprocess
from pathlib import Path
from typing import Any, final

import lightning as L
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint

from nernlit.utilities.signals import SIGNALS, Interrupted


@final
class Interruption(Checkpoint):
    """End a run on SIGTERM and SIGINT (Ctrl-C), and save a checkpoint of a fit.

    A fit ends after the current training batch, or during a validation, and writes `last.ckpt`; a fit that is resumed
    from it ends bit-identical to an uninterrupted one. `validate`, `test` and `predict` save nothing and end at once.
    The exit code is 143 or 130; a second signal ends the process at once. With several processes all of them end after
    the same batch.

    In a SLURM job, the signal that announces its end (SIGUSR1, or the `requeue_signal` of Lightning's
    `SLURMEnvironment`) has the same effect, and the first process puts the job back into the queue.

    It derives from `Checkpoint` because Lightning calls checkpoint callbacks last: the states of all other callbacks
    then belong to the same step.
    """

    def __init__(self) -> None:
        self._signum = 0  # the signal that some process received

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        SIGNALS.restart()
        SIGNALS.forward = getattr(trainer.strategy.launcher, "kill", None)
        self._signum = 0

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        SIGNALS.forward = None

    # Lightning installs its own handlers just before these hooks; they end the process anywhere, with exit code 0 or 1.

    def on_sanity_check_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        SIGNALS.listen(also=_requeue_signals(trainer))

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        SIGNALS.listen(also=_requeue_signals(trainer))

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        SIGNALS.listen(also=_requeue_signals(trainer))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        SIGNALS.listen(also=_requeue_signals(trainer))
        SIGNALS.hold()

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if self._signum:  # a checkpoint was saved after the last batch, and its metrics are logged by now
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
            SIGNALS.listen(also=_requeue_signals(trainer))
        elif self._signum:
            raise Interrupted(self._signum)

    def on_validation_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        # Not earlier: the module may be about to exchange the trained weights for their average.
        if trainer.state.fn == "fit" and not trainer.sanity_checking and trainer.world_size == 1:
            SIGNALS.release_until_hold()

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
        if trainer.is_global_zero and exception.signum in _requeue_signals(trainer) and _is_unfinished(trainer):
            exception.message += f"; {_requeued()}"
        environment = getattr(trainer.strategy, "cluster_environment", None)
        if not trainer.is_global_zero and isinstance(environment, LightningEnvironment):
            exception.code = 0  # otherwise Lightning kills the first process, which started this one

    def _asked_to_stop(self, trainer: L.Trainer) -> bool:
        received = SIGNALS.received or 0
        if trainer.world_size > 1:
            on_device = torch.tensor(received, device=trainer.strategy.root_device)
            received = int(trainer.strategy.reduce(on_device, reduce_op="max"))
        self._signum = self._signum or received
        return bool(self._signum)

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
        written = [each for each in trainer.checkpoint_callbacks if isinstance(each, ModelCheckpoint) and each.dirpath]
        written.sort(key=lambda each: each.filename != "last")  # the best one may be in another folder
        return Path(str(written[0].dirpath), "last.ckpt") if written else None

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
        if not _is_unfinished(trainer):
            return f"interrupted after the last step, {trainer.global_step}; the fit is complete ({file})"
        is_found = bool(trainer.loggers) and file == Path(str(trainer.log_dir), "checkpoints", "last.ckpt")
        return f"interrupted at step {trainer.global_step}; continue with --ckpt_path {'last' if is_found else file}"


def _requeue_signals(trainer: L.Trainer) -> list[int]:
    """The signal on which a SLURM job is to be requeued; empty elsewhere.

    Lightning's own handler would save within a step, where the processes do not agree on the step.
    """
    # Not public. A strategy of one device has no `cluster_environment`.
    environment = trainer._accelerator_connector.cluster_environment
    if not isinstance(environment, SLURMEnvironment) or not environment.auto_requeue:
        return []
    return [int(environment.requeue_signal)] if environment.requeue_signal is not None else []


def _is_unfinished(trainer: L.Trainer) -> bool:
    return trainer.state.fn != "fit" or not trainer.fit_loop.done


def _requeued() -> str:
    """Put this SLURM job back into the queue, and say so."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    job = f"{array}_{task}" if array else os.environ["SLURM_JOB_ID"]
    try:
        subprocess.run(["scontrol", "requeue", job], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", None) or str(error)
        return f"`scontrol requeue {job}` failed: {' '.join(reason.split())}"
    return f"job {job} was requeued"
