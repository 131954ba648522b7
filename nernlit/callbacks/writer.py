"""Writing the reconstructed network."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, final

import lightning as L
import timm
from lightning.pytorch.callbacks import BasePredictionWriter
from rich.console import Console
from safetensors.torch import save
from torch import Tensor

from nernlit.errors import UsageError
from nernlit.originals import Original
from nernlit.storage.files import write_atomically


def write_weights(path: Path, timm_name: str, state: Mapping[str, Tensor]) -> None:
    """Write a network's state dict as safetensors, with its timm name in the file's metadata."""
    write_atomically(path, save({k: v.cpu().contiguous() for k, v in state.items()}, {"timm_name": timm_name}))


def print_written(path: Path, original: Original) -> None:
    """Print the path of a network's weights, and the Python code that loads them into the original's architecture."""
    Console().print(f"wrote {path}\n{_how_to_load(path, original)}", soft_wrap=True, highlight=False, markup=False)


def _how_to_load(path: Path, original: Original) -> str:
    """Code that works in a new Python process."""
    name = original.name
    if not timm.is_model(name):
        return f"load it: safetensors.torch.load_file({str(path)!r})"
    home = timm.model_entrypoint(name).__module__
    imports = "timm" if home.split(".")[0] == "timm" else f"timm, {home}"
    arguments = {"num_classes": original.num_classes, "in_chans": original.in_chans}
    arguments |= (original.architecture or {}).get("arguments", {})
    options = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
    mean, std = ([round(value, 4) for value in values.flatten().tolist()] for values in (original.mean, original.std))
    return (
        f"import {imports}\n"
        f"net = timm.create_model({name!r}, {options}, checkpoint_path={str(path.absolute())!r}).eval()\n"
        f"# its images: pixels in [0, 1], normalized with mean {mean} and std {std}"
    )


def run_folder(trainer: L.Trainer) -> Path:
    """The folder of a run's files. All processes must call it: Lightning broadcasts the path."""
    return Path(trainer.log_dir or trainer.default_root_dir)


@final
class WeightsWriter(BasePredictionWriter):
    """Write the predicted network as safetensors; `timm.create_model(name, checkpoint_path=...)` loads it.

    Args:
        path: The file, NAME.safetensors; None writes `<run folder>/reconstructed.safetensors`.

    Raises:
        UsageError: If the path does not end in .safetensors.
    """

    def __init__(self, path: str | None = None) -> None:
        super().__init__("epoch")
        self.path = None if path is None else Path(path).expanduser()
        if self.path is not None and self.path.suffix != ".safetensors":
            raise UsageError(f"--writer.path {path}: expected a file name that ends in .safetensors.")

    def write_on_epoch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        predictions: Sequence[Any],
        batch_indices: Sequence[Any],
    ) -> None:
        name, state = predictions[0]
        path = self.path or run_folder(trainer) / "reconstructed.safetensors"
        if not trainer.is_global_zero:
            return
        write_weights(path, name, state)
        owner: Any = getattr(pl_module, "representation", pl_module)
        print_written(path, owner.original)
