"""Low-frequency energy and reconstruction error per layer, as scalars, a figure and a CSV file."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import final

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.figure import Figure

from nernlit.analysis import energy_figure, layer_energies, layer_error_figure, layer_errors
from nernlit.callbacks.writer import run_folder
from nernlit.representation import Representation
from nernlit.storage.files import write_table
from nernlit.utilities.processes import Processes

_Measured = tuple[Mapping[str, Mapping[str, float]], Callable[[], Figure]]


class _LayerTable(L.Callback, ABC):
    """Measures every layer after each validation of a fit; in `validate` and `test` it writes only the CSV file."""

    name: str

    @abstractmethod
    def measure(self, representation: Representation, processes: Processes) -> _Measured:
        """The measurements per layer, by the layer's name, and a function that draws them.

        All processes call it, and the first one uses the result.
        """

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._measure(trainer, pl_module, run_folder(trainer))

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._measure(trainer, pl_module, run_folder(trainer))

    def _measure(self, trainer: L.Trainer, pl_module: L.LightningModule, folder: Path) -> None:
        representation = getattr(pl_module, "representation", None)
        if not isinstance(representation, Representation):
            return
        layers, figure = self.measure(representation, Processes.from_trainer(trainer))
        if not trainer.is_global_zero:
            return
        scalars = {f"{self.name}/{of}/{layer}": value for layer, row in layers.items() for of, value in row.items()}
        # An evaluation of a checkpoint logs no scalars: its fit has logged them.
        for logger in trainer.loggers if trainer.state.fn == "fit" else []:
            logger.log_metrics(scalars, trainer.global_step)
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_figure(self.name, figure(), trainer.global_step)
        rows = [{"layer": layer, **row} for layer, row in layers.items()]
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]  # has no folder
            write_table(folder / f"{self.name}.csv", rows)


@final
class LowFrequencyEnergy(_LayerTable):
    """The share of each layer's energy in the larger half of its singular values (arXiv 2407.00356, Fig. 2 and 8).

    Scalars `low_frequency_energy/{original,reconstructed,difference}/LAYER`, a figure of the differences, and
    `low_frequency_energy.csv` in the run's folder. Nothing is measured where an original is trained.
    """

    name = "low_frequency_energy"

    def measure(self, representation: Representation, processes: Processes) -> _Measured:
        energies = layer_energies(representation, processes)
        rows = {
            energy.name: {
                "original": energy.original,
                "reconstructed": energy.reconstructed,
                "difference": energy.difference,
            }
            for energy in energies
        }
        return rows, partial(energy_figure, {"reconstructed": energies})


@final
class LayerDifference(_LayerTable):
    """The distance between each layer's original and reconstructed weight (arXiv 2407.00356, Fig. 4).

    Scalars `layer_difference/{rmse,explained_power}/LAYER`, a figure, and `layer_difference.csv`. Nothing is measured
    where an original is trained.
    """

    name = "layer_difference"

    def measure(self, representation: Representation, processes: Processes) -> _Measured:
        errors = layer_errors(representation) if processes.rank == 0 else []
        rows = {error.name: {"rmse": error.rmse, "explained_power": error.explained_power} for error in errors}
        return rows, partial(layer_error_figure, {"reconstructed": errors})
