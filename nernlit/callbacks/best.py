"""The best checkpoint of a fit."""

from pathlib import Path
from typing import Any, final

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from nernlit.errors import UsageError

_LARGER_IS_BETTER = ("acc", "explained_power")
_SMALLER_IS_BETTER = ("rmse", "loss", "recon", "bytes", "kd", "cross_entropy")


def _mode_of(monitor: str) -> str:
    """Whether a metric is to be maximized or minimized, by its name.

    Raises:
        UsageError: If the name does not say it.
    """
    name = monitor.rpartition("/")[2]
    for mode, known in (("min", _SMALLER_IS_BETTER), ("max", _LARGER_IS_BETTER)):
        if any(part in name for part in known):
            return mode
    raise UsageError(f"best_checkpoint.monitor {monitor!r}: pass best_checkpoint.mode as well, min or max.")


@final
class BestCheckpoint(ModelCheckpoint):
    """A `ModelCheckpoint` that keeps the best validation accuracy; of equal ones, the later.

    Lightning keeps the earlier one. On a few hundred images ties are common, and longer training reconstructs better.
    Lightning also forgets the best of a resumed fit whose folder has been moved, or is given as another path.

    Args:
        mode: `min` or `max`; None for `max` with accuracies and explained power, `min` with errors, losses and sizes.
        kwargs: See `ModelCheckpoint`.

    Raises:
        UsageError: If several checkpoints would have the same file name, or the metric's name does not say which
            values are good.
    """

    def __init__(
        self, filename: str | None = "best", monitor: str | None = "val/acc", mode: str | None = None, **kwargs: Any
    ) -> None:
        if mode is None:
            mode = "min" if monitor is None else _mode_of(monitor)
        for name in ("every_n_train_steps", "train_time_interval"):
            if kwargs.get(name):
                raise UsageError(f"{name} of the best checkpoint: it is chosen after validations; leave it out.")
        super().__init__(filename=filename, monitor=monitor, mode=mode, **kwargs)
        if self.save_top_k not in (0, 1) and not (filename is None or "{" in filename or self._enable_version_counter):
            raise UsageError(
                f"save_top_k={self.save_top_k}: all of these checkpoints would be named {filename}.ckpt; pass a "
                'filename with a placeholder, such as "best-{step}".'
            )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(self._with_current_paths(state_dict))

    def _with_current_paths(self, state: dict[str, Any]) -> dict[str, Any]:
        """The state with its checkpoints in the folder of this fit, if they are all there."""
        best, others = state["best_model_path"], state.get("best_k_models", {})
        if self.dirpath is None or not best:
            return state
        places = {path: str(Path(self.dirpath, Path(path).name)) for path in (best, *others)}
        if not all(Path(place).is_file() for place in places.values()):
            return state
        return {
            **state,
            "dirpath": self.dirpath,
            "best_model_path": places[best],
            "kth_best_model_path": places.get(state.get("kth_best_model_path", ""), ""),
            "best_k_models": {places[path]: score for path, score in others.items()},
        }

    def check_monitor_top_k(self, trainer: L.Trainer, current: Tensor | None = None) -> bool:
        if current is not None and self.best_model_score is not None and current == self.best_model_score:
            return self.save_top_k != 0
        return super().check_monitor_top_k(trainer, current)
