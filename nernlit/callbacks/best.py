"""The best checkpoint of a fit."""

from pathlib import Path
from typing import Any, final

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from nernlit.errors import UsageError


@final
class BestCheckpoint(ModelCheckpoint):
    """A `ModelCheckpoint` that keeps the best validation accuracy; of equal ones, the later.

    Lightning keeps the earlier one. On a few hundred images ties are common, and longer training reconstructs better.
    Lightning also forgets the best of a resumed fit whose folder has been moved, or is given as another path.

    Args:
        kwargs: See `ModelCheckpoint`.

    Raises:
        UsageError: If several checkpoints would have the same file name.
    """

    def __init__(
        self, filename: str | None = "best", monitor: str | None = "val/acc", mode: str = "max", **kwargs: Any
    ) -> None:
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
