"""Writing and reading checkpoints."""

import io
from pathlib import Path
from typing import Any, final

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO

from nernlit.storage.checkpoint import read_checkpoint
from nernlit.storage.files import write_atomically


@final
class DurableCheckpointIO(TorchCheckpointIO):
    """A plugin for Lightning's `Trainer` that writes checkpoints atomically and validates them when reading.

    A checkpoint is written to a temporary file, flushed to disk and then replaces the former one. Reading checks every
    checksum and that weights and optimizer states are finite. The command line uses it; elsewhere pass
    `Trainer(plugins=[DurableCheckpointIO()])`. URLs (`s3://...`) are left to Lightning.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        if "://" in str(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        # Not directly into the file: PyTorch's writer ends the process if the disk is full.
        content = io.BytesIO()
        torch.save(checkpoint, content)
        write_atomically(Path(path), content.getbuffer())

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        if "://" in str(path):
            return super().load_checkpoint(path, map_location, weights_only)
        return read_checkpoint(path)
