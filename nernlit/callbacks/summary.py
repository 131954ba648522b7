"""The table of results at the end of a fit, a validation or a test."""

from pathlib import Path
from typing import Any, final

import lightning as L
import torch
import yaml
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from nernlit.representation import Representation
from nernlit.representation.specification import options
from nernlit.utilities.tables import print_table


@final
class Summary(L.Callback):
    """Print one table, say where TensorBoard's files are, and fill TensorBoard's hparams tab with the final metrics."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._has_trained = False

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self._has_trained = True

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        at_end = trainer.current_epoch == trainer.max_epochs or trainer.global_step == trainer.max_steps
        if at_end and not self._has_trained and trainer.is_global_zero:
            print(f"The fit is already complete after {trainer.global_step:,} steps.", flush=True)
        self._finish(trainer, pl_module, "val")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == "validate":
            self._finish(trainer, pl_module, "val")

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._finish(trainer, pl_module, "test")

    @rank_zero_only
    def _finish(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        representation = getattr(pl_module, "representation", None)
        if isinstance(representation, Representation):
            sizes = representation.sizes(**getattr(pl_module, "save_options", {}))
            metrics["size/predictor_params"] = sizes.predictor_params
            metrics |= {"size/code_bits": sizes.code_bits} if sizes.code_bits else {}
            metrics |= {"size/cr_paper": sizes.cr_paper, "size/cr_file": sizes.cr_file}
        shown = {name: value for name, value in metrics.items() if name.startswith(f"{stage}/")}
        # Metrics of single rounds and trials are left out: the hparams tab compares whole runs.
        final = {
            name: value
            for name, value in metrics.items()
            if name.startswith((f"{stage}/", "size/")) and not any(word in name for word in ("_round_", "_trial_"))
        }
        if not shown:
            return
        print_table({"val": "validation", "test": "test"}[stage], ("metric", "value"), _rows(shown, metrics, stage))
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                if trainer.state.fn == "fit" and pl_module.hparams:
                    # Not `trainer.log_dir`, which waits for the other processes: they are not in this method.
                    found = _hyperparameters(trainer, pl_module, Path(logger.log_dir))
                    logger.log_hyperparams(found, final, max(0, trainer.global_step - 1))
                print(f"TensorBoard: tensorboard --logdir {logger.log_dir}", flush=True)


def _rows(shown: dict[str, float], metrics: dict[str, float], stage: str) -> list[tuple[str, str]]:
    named = {
        "original accuracy": (f"{stage}/acc_original", "{:.2%}"),
        "reconstructed accuracy" if f"{stage}/acc_original" in shown else "accuracy": (f"{stage}/acc", "{:.2%}"),
        "RMSE (weight units)": (f"{stage}/recon_rmse", "{:.5f}"),
        "explained power": (f"{stage}/explained_power", "{:.2%}"),
        "predictor parameters": ("size/predictor_params", "{:,.0f}"),
        "bits of codes": ("size/code_bits", "{:,.0f}"),
        "CR (predictor / predicted weights)": ("size/cr_paper", "{:.1%}"),
        "CR (.nern file / original's file)": ("size/cr_file", "{:.1%}"),
    }
    rows = [(title, form.format(metrics[name])) for title, (name, form) in named.items() if name in metrics]
    for condition, accuracy in _conditions(shown, stage).items():
        original = shown.get(f"{stage}/acc_{condition}_original")
        beside = f" (original {original:.2%})" if original is not None else ""
        rows.append((f"accuracy, {condition}", f"{accuracy:.2%}{beside}"))
    return rows


def _hyperparameters(trainer: L.Trainer, pl_module: L.LightningModule, folder: Path) -> dict[str, Any]:
    """Options of the module, the seed, and the data's class and options, for TensorBoard's hparams tab."""
    found = {**pl_module.hparams, "seed": getattr(pl_module, "seed", torch.initial_seed())}
    config = folder / "config.yaml"
    if config.is_file():  # a fit of the command line
        found["data"] = yaml.safe_load(config.read_text(encoding="utf-8")).get("data")
    elif (data := getattr(trainer, "datamodule", None)) is not None:
        found["data"] = type(data).__name__
    return {n: v if isinstance(v, bool | int | float | str) else str(v) for n, v in options(found)}


def _conditions(shown: dict[str, float], stage: str) -> dict[str, float]:
    """Accuracy under each attack, and the mean accuracy on each further test set (TensorBoard has every condition)."""
    if stage != "test":
        return {}
    prefix = f"{stage}/acc_"
    found = {
        name.removeprefix(prefix): value
        for name, value in shown.items()
        if name.startswith(prefix) and "_top5" not in name and not name.endswith("_original")
    }
    return {name: value for name, value in found.items() if not any(name.startswith(f"{other}_") for other in found)}
