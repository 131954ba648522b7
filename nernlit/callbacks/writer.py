"""Writing what `predict` gives: the reconstructed network."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, final

import lightning as L
from lightning.pytorch.callbacks import BasePredictionWriter
from rich.console import Console
from safetensors.torch import save
from torch import Tensor

from nernlit.files import write_atomically


def write_weights(path: Path, timm_name: str, state: Mapping[str, Tensor]) -> None:
    """Write a network's state dict as safetensors, with its timm name in the file's metadata."""
    write_atomically(path, save({k: v.cpu().contiguous() for k, v in state.items()}, {"timm_name": timm_name}))


def run_folder(trainer: L.Trainer) -> Path:
    """Where a run's files go. Every process has to ask: the answer is sent to all of them."""
    return Path(trainer.log_dir or trainer.default_root_dir)


@final
class WeightsWriter(BasePredictionWriter):
    """Write the predicted network as safetensors; `timm.create_model(name, checkpoint_path=...)` loads it.

    Args:
        path: The file; None writes `<run folder>/reconstructed.safetensors`.
    """

    def __init__(self, path: str | None = None) -> None:
        super().__init__("epoch")
        self.path = path

    def write_on_epoch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        predictions: Sequence[Any],
        batch_indices: Sequence[Any],
    ) -> None:
        name, state = predictions[0]
        path = Path(self.path or run_folder(trainer) / "reconstructed.safetensors")
        if not trainer.is_global_zero:
            return
        write_weights(path, name, state)
        classes = getattr(pl_module, "num_classes", None)
        Console().print(
            f'wrote {path}\nload it: timm.create_model("{name}", num_classes={classes}, checkpoint_path="{path}")',
            soft_wrap=True,
            highlight=False,
        )
