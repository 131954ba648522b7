"""The figures that matter, once a fit or a test is over."""

from typing import Any, final

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.table import Table

from nernlit.representation import Representation


@final
class Summary(L.Callback):
    """Print one table, say where TensorBoard's files are, and fill TensorBoard's hparams tab with the final metrics."""

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
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
            metrics["size/cr_paper"] = representation.sizes().cr_paper
        shown = {name: value for name, value in metrics.items() if name.startswith(f"{stage}/")}
        # Curves of single rounds and trials have ended where they have; the hparams tab compares runs.
        final = {
            name: value
            for name, value in metrics.items()
            if name.startswith((f"{stage}/", "size/")) and not any(word in name for word in ("_round_", "_trial_"))
        }
        if not shown:
            return
        console = Console()
        console.print(_table(shown, metrics, stage))
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                if trainer.state.fn == "fit" and pl_module.hparams:
                    logger.log_hyperparams(_flat(dict(pl_module.hparams)), final, max(0, trainer.global_step - 1))
                console.print(f"TensorBoard: tensorboard --logdir {logger.log_dir}", soft_wrap=True, highlight=False)


def _table(shown: dict[str, float], metrics: dict[str, float], stage: str) -> Table:
    table = Table(title={"val": "validation", "test": "test"}[stage], title_justify="left")
    rows = {
        "original accuracy": (f"{stage}/acc_original", "{:.2%}"),
        "reconstructed accuracy" if f"{stage}/acc_original" in shown else "accuracy": (f"{stage}/acc", "{:.2%}"),
        "RMSE (weight units)": (f"{stage}/recon_rmse", "{:.5f}"),
        "variance explained": (f"{stage}/variance_explained", "{:.2%}"),
        "CR (predictor / predicted weights)": ("size/cr_paper", "{:.1%}"),
    }
    table.add_column("figure")
    table.add_column("value", justify="right")
    for title, (name, form) in rows.items():
        if name in metrics:
            table.add_row(title, form.format(metrics[name]))
    for condition, accuracy in _conditions(shown, stage).items():
        original = shown.get(f"{stage}/acc_{condition}_original")
        beside = f" (original {original:.2%})" if original is not None else ""
        table.add_row(f"accuracy, {condition}", f"{accuracy:.2%}{beside}")
    return table


def _conditions(shown: dict[str, float], stage: str) -> dict[str, float]:
    """Accuracy under attacks, and the mean over each further test set; its single conditions are in TensorBoard."""
    if stage != "test":
        return {}
    prefix = f"{stage}/acc_"
    found = {
        name.removeprefix(prefix): value
        for name, value in shown.items()
        if name.startswith(prefix) and "_top5" not in name and not name.endswith("_original")
    }
    found.pop("original", None)
    return {name: value for name, value in found.items() if not any(name.startswith(f"{other}_") for other in found)}


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries with their keys joined by dots, as TensorBoard wants them."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, bool | int | float | str) else str(value)
    return flat
