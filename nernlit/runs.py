"""Finished fits, as their folders hold them: `runs/<name>/version_N`."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self, final

import torch
import yaml
from jsonargparse import ArgumentParser
from torch import Tensor

from nernlit.checkpoint import load_representation
from nernlit.data import ImageDataModule
from nernlit.errors import UsageError
from nernlit.representation import Representation

Split = Literal["train", "test"]
Batches = list[tuple[Tensor, Tensor]]


def distinct_names(runs: Sequence["Run"]) -> list[str]:
    """Each run's name, with more of its path where two would have the same.

    Raises:
        UsageError: If a checkpoint is given twice.
    """
    paths = [(*run.folder.resolve().parts, run.checkpoint.stem) for run in runs]
    for number, path in enumerate(paths):
        if path in paths[:number]:
            raise UsageError(f"{runs[number].checkpoint} is given twice; name every run once.")
    names, depth = [run.name for run in runs], 3
    while len(set(names)) < len(names):
        names = ["/".join(path[-depth:]) for path in paths]
        depth += 1
    return names


@final
@dataclass(frozen=True)
class Run:
    """A fit's folder and one of its checkpoints.

    Attributes:
        folder: With `config.yaml`, TensorBoard's files and `checkpoints/` in it.
        checkpoint: What is looked at.
    """

    folder: Path
    checkpoint: Path

    @classmethod
    def open(cls, path: str | Path, select: Literal["best", "last"] = "best") -> Self:
        """A run by its folder, by the folder above it (the newest version), or by a checkpoint inside it.

        Raises:
            UsageError: If there is no such run.
        """
        path = Path(path)
        if path.suffix == ".ckpt" and path.is_file():
            folder = next((above for above in path.parents if (above / "config.yaml").is_file()), path.parent)
            return cls(folder, path)
        found = [path, *path.glob("version_*")]
        runs = [folder for folder in found if (folder / "checkpoints" / f"{select}.ckpt").is_file()]
        if not runs:
            raise UsageError(
                f"{path} is no run: no checkpoints/{select}.ckpt in it or in a version_* below; "
                "pass a folder that `nernlit fit` wrote (runs/<name>/version_N), or a .ckpt."
            )
        folder = max(runs, key=lambda folder: (folder / "checkpoints" / f"{select}.ckpt").stat().st_mtime)
        return cls(folder, folder / "checkpoints" / f"{select}.ckpt")

    @property
    def name(self) -> str:
        """The configuration's name, the version, and the checkpoint where it is not one that every fit has."""
        own = [] if self.checkpoint.stem in ("best", "last") else [self.checkpoint.stem]
        return "/".join([self.folder.parent.name, self.folder.name, *own])

    @cached_property
    def config(self) -> dict[str, Any]:
        """The configuration that the run was fitted with.

        Raises:
            UsageError: If the folder has none.
        """
        file = self.folder / "config.yaml"
        if not file.is_file():
            raise UsageError(f"{self.folder} has no config.yaml, which says what data the run was fitted with.")
        config: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))
        return config

    def representation(self) -> Representation:
        """The checkpoint's representation, on the CPU."""
        return load_representation(self.checkpoint)[0].eval()

    def data(self, overrides: Sequence[str] = ()) -> ImageDataModule:
        """The run's data, with overrides as on the command line (`--data.root DIR`)."""
        parser = ArgumentParser(exit_on_error=False, allow_abbrev=False)
        parser.add_subclass_arguments(ImageDataModule, "data")
        given = parser.parse_args(["--data", json.dumps(self.config["data"]), *overrides])
        data: ImageDataModule = parser.instantiate_classes(given).data
        return data

    def batches(self, split: Split, images: int | None = None, overrides: Sequence[str] = ()) -> Batches:
        """Pixels in [0, 1] and labels of a split as the dataset publishes it, without augmentation.

        Args:
            split: Which.
            images: How many, drawn with a fixed seed; all by default.
            overrides: Of the data's configuration.
        """
        data = self.data(overrides)
        if not data.has_images:
            raise UsageError(f"{self.folder} was fitted without images; name some (--data CLASS and its options).")
        data.train_on, data.network = "images", self.representation().original
        data.prepare_data()
        data.setup("fit" if split == "train" else "test")
        source = data.sources[split]
        chosen = torch.randperm(len(source), generator=torch.Generator().manual_seed(0))[:images].sort().values
        parts = [source[part.tolist()] for part in chosen.split(data.eval_batch_size)]
        return [(pixels.float() / 255, labels) for pixels, labels in parts]
