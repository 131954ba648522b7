"""The checkpoints and records of the rounds of a Progressive fit."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, final

import lightning as L
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from nernlit.analysis import rounds_figure
from nernlit.callbacks.checkpoint_io import DurableCheckpointIO
from nernlit.callbacks.writer import run_folder, write_weights
from nernlit.storage.files import write_atomically


@final
class RoundCheckpoint(Checkpoint):
    """Save each round of a Progressive fit.

    At the last validation of a round it writes to the folder `rounds/` of the run: `round-RR.ckpt` (the best trial as
    a Recon-only checkpoint), `round-RR.safetensors` (its reconstructed CNN, which can be an `original.checkpoint`) and
    `rounds.json` (all rounds so far). With images, it draws accuracy and error over the rounds for TensorBoard. With
    other schemes it does nothing.
    """

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit" or not getattr(pl_module, "round_is_over", False):
            return
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]  # has no folder
            self._write(trainer, pl_module, run_folder(trainer) / "rounds")

    @rank_zero_only
    def _write(self, trainer: L.Trainer, pl_module: Any, folder: Path) -> None:
        stem = folder / f"round-{pl_module.round:02d}"
        name, state = pl_module.network()
        write_weights(stem.with_suffix(".safetensors"), name, state)
        DurableCheckpointIO().save_checkpoint(self._as_recon_only(trainer, pl_module), stem.with_suffix(".ckpt"))
        records = [asdict(record) for record in pl_module.ended]
        write_atomically(folder / "rounds.json", (json.dumps(records, indent=1) + "\n").encode())
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger) and pl_module.ended[-1].val_acc is not None:
                original = float(trainer.callback_metrics["val/acc_original"])
                figure = rounds_figure(
                    [record["val_acc"] for record in records], [record["recon_rmse"] for record in records], original
                )
                logger.experiment.add_figure("rounds", figure, pl_module.round)

    @staticmethod
    def _as_recon_only(trainer: L.Trainer, pl_module: Any) -> dict[str, Any]:
        state = pl_module.representation.state_dict(prefix="representation.")
        hyper = dict(pl_module.hparams)
        kept = ("representation", "optimizer", "scheduler", "sampling", "loss", "_instantiator")
        described = {key: hyper[key] for key in kept if key in hyper}
        if hyper.get("init_from") is not None:  # the .nern file that the representation came out of
            described["init_from"] = hyper["init_from"]
        return {
            "pytorch-lightning_version": L.__version__,
            "epoch": trainer.current_epoch,
            "global_step": trainer.global_step,
            "state_dict": state,
            "sampling_seed": pl_module.seed,
            **({"hyper_parameters": {"_class_path": "nernlit.ReconOnly", **described}} if described else {}),
        }
