"""TensorBoard figures of the representation during a fit."""

from typing import Any, final

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from nernlit.analysis import kernel_figure, layer_error_figure, layer_errors
from nernlit.errors import require_at_least
from nernlit.representation import Representation


@final
class RepresentationFigures(L.Callback):
    """Draw the error of every layer, and some kernels of the original and of the reconstructed CNN.

    Args:
        every_n_validations: Draw after every n-th validation, in addition to the end of the fit; 0 for the end only.
    """

    def __init__(self, every_n_validations: int = 0) -> None:
        require_at_least(0, every_n_validations=every_n_validations)
        self.every_n_validations = every_n_validations
        self._validations = 0

    @property
    def state_key(self) -> str:
        return self._generate_state_key(every_n_validations=self.every_n_validations)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        self._validations += 1
        if self.every_n_validations and self._validations % self.every_n_validations == 0:
            self._draw(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        return {"validations": self._validations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._validations = state_dict["validations"]

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._draw(trainer, pl_module)

    @rank_zero_only
    def _draw(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        representation = getattr(pl_module, "representation", None)
        if not isinstance(representation, Representation):
            return
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                writer, step = logger.experiment, trainer.global_step
                writer.add_figure(
                    "layers/error", layer_error_figure({"reconstructed": layer_errors(representation)}), step
                )
                writer.add_figure("kernels", kernel_figure(representation), step)
