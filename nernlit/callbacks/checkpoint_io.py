"""How checkpoints reach the disk and come back."""

import io
from pathlib import Path
from typing import Any, final

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO

from nernlit.storage.checkpoint import read_checkpoint
from nernlit.storage.files import write_atomically


@final
class DurableCheckpointIO(TorchCheckpointIO):
    """A plugin for Lightning's `Trainer` that writes checkpoints whole or not at all, and reads only whole ones.

    A checkpoint is written beside its target, reaches the disk and then takes the former one's place. Reading checks
    every checksum and that weights and optimizer states are finite. The command line has it built in; elsewhere pass
    `Trainer(plugins=[DurableCheckpointIO()])`. Paths that are URLs (`s3://...`) stay with Lightning.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        if "://" in str(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        # Not into the file: PyTorch's writer ends the process where a disk is full.
        content = io.BytesIO()
        torch.save(checkpoint, content)
        write_atomically(Path(path), content.getbuffer())

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        if "://" in str(path):
            return super().load_checkpoint(path, map_location, weights_only)
        return read_checkpoint(path)
