"""Finished fits, as their folders hold them: `runs/<name>/version_N`."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self, final

import torch
from jsonargparse import ArgumentParser
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from nernlit.cli.yaml_files import read_config
from nernlit.data import ImageDataModule
from nernlit.errors import CheckpointError, UsageError
from nernlit.representation import Representation, load_representation
from nernlit.storage.file_kinds import describe_file
from nernlit.utilities.progress import progress

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
class EndedRound:
    """A round of a Progressive fit.

    Attributes:
        number: From 1.
        recon_rmse: The winner's distance from the original, in weight units.
        weights: File of its reconstructed network.
    """

    number: int
    recon_rmse: float
    weights: Path


@final
@dataclass(frozen=True)
class Run:
    """A fit's folder and one of its checkpoints.

    Attributes:
        folder: With `config.yaml`, TensorBoard's files and `checkpoints/` in it.
        checkpoint: What is looked at.
        original: File of the original's weights, where it is no longer where the checkpoint says.
    """

    folder: Path
    checkpoint: Path
    original: Path | None = None

    @classmethod
    def open(
        cls, path: str | Path, select: Literal["best", "last"] | None = None, original: Path | None = None
    ) -> Self:
        """A run by its folder, by the folder above it (the newest version), or by a checkpoint inside it.

        Args:
            path: Which.
            select: Of a folder's checkpoints; the best by default.
            original: See `Run`.

        Raises:
            UsageError: If there is no such run, or a file is given and `select` too.
        """
        path = Path(path)
        if path.suffix == ".ckpt" and path.is_file():
            if select is not None:
                raise UsageError(f"--select {select}: {path} is a checkpoint already; leave one of them out.")
            near = (*path.parents[:2], *path.absolute().parents[:2])
            return cls(
                next((above for above in near if (above / "config.yaml").is_file()), path.parent), path, original
            )
        name = f"{select or 'best'}.ckpt"
        found = [path, *path.glob("version_*")] if path.is_dir() else []
        runs = [folder for folder in found if (folder / "checkpoints" / name).is_file()]
        if not runs:
            others = {file.name for folder in found for file in folder.glob("checkpoints/*.ckpt")}
            hint = f" (there is {', '.join(sorted(others))})" if others else ""
            what = f"it is {describe_file(path)}" if path.is_file() else f"no checkpoints/{name} in it"
            raise UsageError(
                f"{path} is no run: {what}{'' if path.is_file() else f' or in a version_* below{hint}'}; "
                "pass a folder that `nernlit fit` wrote (runs/<name>/version_N), or a .ckpt."
            )
        folder = max(runs, key=lambda folder: (folder / "checkpoints" / name).stat().st_mtime)
        return cls(folder, folder / "checkpoints" / name, original)

    @property
    def name(self) -> str:
        """The configuration's name, the version, and the checkpoint where it is not one that every fit has."""
        own = [] if self.checkpoint.stem in ("best", "last") else [self.checkpoint.stem]
        return "/".join([*self.folder.absolute().parts[-2:], *own])

    @cached_property
    def config(self) -> dict[str, Any]:
        """The configuration that the run was fitted with.

        Raises:
            UsageError: If the folder has none, or it cannot be read.
        """
        file = self.folder / "config.yaml"
        if not file.is_file():
            raise UsageError(f"{self.folder} has no config.yaml, which says what data the run was fitted with.")
        return read_config(file)

    def representation(self) -> Representation:
        """The checkpoint's representation, on the CPU."""
        return self._representation

    @cached_property
    def _representation(self) -> Representation:
        return load_representation(self.checkpoint, original=self.original)[0].eval()

    def rounds(self) -> list[EndedRound]:
        """The rounds of a Progressive fit, the first one first.

        Raises:
            UsageError: If it is no such fit, or its record is damaged.
        """
        record = self.folder / "rounds" / "rounds.json"
        if not record.is_file():
            raise UsageError(f"{self.folder} has no rounds/rounds.json: it is no run of Progressive.")
        damaged = f"{record} is damaged: expected a list of rounds 1, 2, ... with a finite `recon_rmse` each"
        try:
            content = json.loads(record.read_text(encoding="utf-8"))
            found = [(entry["round"], float(entry["recon_rmse"])) for entry in content]
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
            raise UsageError(f"{damaged}; run the fit again.") from error
        if not found or [number for number, _ in found] != list(range(1, len(found) + 1)):
            raise UsageError(f"{damaged}; it has {len(found)}. Run the fit again.")
        if not all(math.isfinite(rmse) and rmse >= 0 for _, rmse in found):
            raise UsageError(f"{damaged}; run the fit again.")
        return [EndedRound(number, rmse, record.with_name(f"round-{number:02d}.safetensors")) for number, rmse in found]

    def data(self, overrides: Sequence[str] = ()) -> ImageDataModule:
        """The run's data, with overrides as on the command line (`--data.root=DIR`).

        Raises:
            UsageError: If the run was fitted without data and the overrides name none.
        """
        own = self.config.get("data")
        if own is None and not overrides:
            raise UsageError(
                f"{self.folder} was fitted without data; name it: --data=CIFAR10DataModule --data.root=DIR."
            )
        parser = ArgumentParser(exit_on_error=False, allow_abbrev=False)
        parser.add_subclass_arguments(ImageDataModule, "data")
        given = parser.parse_args([*(["--data", json.dumps(own, default=str)] if own is not None else []), *overrides])
        data: ImageDataModule = parser.instantiate(given).data
        return data

    def batches(
        self, split: Split, images: int | None = None, overrides: Sequence[str] = (), at_most: int | None = None
    ) -> Batches:
        """Pixels in [0, 1] and labels of a split as the dataset publishes it, without augmentation.

        Args:
            split: Which.
            images: How many, drawn with a fixed seed; all by default.
            overrides: Of the data's configuration.
            at_most: As `images`, but all where the split has fewer.

        Raises:
            UsageError: If the split has fewer than `images`.
        """
        data = self.data(overrides)
        if not data.has_images:
            raise UsageError(f"{self.folder} was fitted without images; name some (--data CLASS and its options).")
        data.train_on, data.network = "images", self.representation().original
        data.eval_sets = []  # of the split itself
        data.prepare_data()
        data.setup("fit" if split == "train" else "test")
        source = data.sources[split]
        if images is not None and images > len(source):
            raise UsageError(f"--images {images}: the {split} split has {len(source)} images.")
        chosen = torch.randperm(len(source), generator=torch.Generator().manual_seed(0))[: images or at_most]
        batches: Batches = []
        with progress(f"reading {len(chosen):,} {split} images", len(chosen)) as advance:
            for part in chosen.sort().values.split(data.eval_batch_size):
                pixels, labels = source[part.tolist()]
                batches.append((pixels.float() / 255, labels))
                advance(len(part))
        return batches


def read_round(ended: EndedRound, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a round's network.

    Args:
        ended: Which round.
        like: The weights that are needed, by name, as another network of the same fit has them.

    Raises:
        CheckpointError: If the file is missing or damaged, or belongs to another network.
    """
    file = ended.weights
    if not file.is_file():
        raise CheckpointError(f"{file} is missing: the network of round {ended.number}; run the fit again.")
    try:
        state = load_file(file)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{file} is {describe_file(file)}; expected the network of a round.") from error
    for name, weight in like.items():
        if name not in state or state[name].shape != weight.shape:
            raise CheckpointError(f"{file} belongs to another network: {name} is missing or has another shape.")
        if not state[name].isfinite().all():
            raise CheckpointError(f"{file} is damaged: {name} is not finite.")
    return {name: state[name] for name in like}
