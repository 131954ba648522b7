"""Inputs of commands: folders of fits (`runs/<name>/version_N`), checkpoints and .nern files."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self, final

import torch
from jsonargparse import ArgumentParser

from nernlit.cli.images import Batches
from nernlit.cli.rounds import EndedRound, read_rounds, rounds_record
from nernlit.cli.yaml_files import read_config
from nernlit.coding import is_nern
from nernlit.data import ImageDataModule, NoImages
from nernlit.errors import UsageError
from nernlit.representation import Representation, Sizes, load_representation
from nernlit.storage.checkpoint import read_checkpoint
from nernlit.storage.file_kinds import describe_file

Split = Literal["train", "test"]
#: Length of the hash in the name of the folder of a sweep's fit.
_HASH_LENGTH = 8


def distinct_names(runs: Sequence["Run"]) -> list[str]:
    """Each run's name, with more of its path if two runs have the same name.

    Raises:
        UsageError: If a file is given twice.
    """
    paths = [(*run.folder.resolve().parts, run.checkpoint.name if run.is_file else run.checkpoint.stem) for run in runs]
    for number, path in enumerate(paths):
        if path in paths[:number]:
            raise UsageError(f"{runs[number].checkpoint} is given twice; pass each run once.")
    names, depth = [run.name for run in runs], 3
    while len(set(names)) < len(names):
        names = ["/".join(path[-depth:]) for path in paths]
        depth += 1
    return names


def version_of(folder: Path) -> int:
    """The number N of a run's folder `version_N`; -1 for other names, such as those of a sweep's fits.

    Runs are numbered in the order of their starts. Times of files would depend on the clock, and change when copied.
    """
    number = folder.name.removeprefix("version_")
    return int(number) if number.isdecimal() and len(number) < _HASH_LENGTH else -1


@final
@dataclass(frozen=True)
class Run:
    """A trained representation: one checkpoint of a fit, or a .nern file.

    Attributes:
        folder: The fit's folder, with `config.yaml`, TensorBoard's files and `checkpoints/`; of a .nern file, the
            folder that it is in.
        checkpoint: The checkpoint, or the .nern file.
        original: File of the original's weights: for a checkpoint, if that file has moved since the fit; for a .nern
            file, which does not hold the original, if something is compared with it.
    """

    folder: Path
    checkpoint: Path
    original: Path | None = None

    @classmethod
    def open(
        cls, path: str | Path, select: Literal["best", "last"] | None = None, original: Path | None = None
    ) -> Self:
        """Find a run.

        Args:
            path: The folder of a fit, the folder above it (for the newest version), a checkpoint, or a .nern file.
            select: Which checkpoint of a folder; the best by default.
            original: See `Run`.

        Raises:
            UsageError: If there is no such run, or a file is given and `select` too.
        """
        path = Path(path)
        if original is not None and original.is_dir():
            original = cls.open(original).checkpoint
        if is_nern(path):
            if select is not None:
                raise UsageError(f"--select {select}: {path} holds one representation; leave --select out.")
            return cls(path.parent, path, original)
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
                f"{path} is not a run: {what}{'' if path.is_file() else f' or in a version_* below{hint}'}; "
                "pass a folder that `nernlit fit` wrote (runs/<name>/version_N), a .ckpt or a .nern file."
            )
        if path not in runs and len(runs) > 1 and any(version_of(folder) < 0 for folder in runs):
            raise UsageError(
                f"{path} has several runs, whose names do not say which is the newest; pass one of "
                f"{', '.join(sorted(folder.name for folder in runs))}."
            )
        folder = path if path in runs else max(runs, key=version_of)
        return cls(folder, folder / "checkpoints" / name, original)

    @property
    def is_file(self) -> bool:
        """Whether it is a .nern file: without configuration, logged metrics, rounds and original."""
        return is_nern(self.checkpoint)

    @property
    def has_original(self) -> bool:
        """Whether the original that was represented is known; that of a bare .nern file is the reconstructed one."""
        return not self.is_file or self.original is not None

    def require_original(self, command: str) -> None:
        """Refuse a .nern file without its original, for a command that compares with the original.

        Raises:
            UsageError: With the option that is missing.
        """
        if not self.has_original:
            raise UsageError(
                f"{command} compares with the original, which {self.checkpoint} does not hold; "
                "pass its weights: --original FILE."
            )

    @property
    def name(self) -> str:
        """A fit's name and version, and its checkpoint if that is neither `best` nor `last`; a .nern file's name."""
        if self.is_file:
            return self.checkpoint.name
        own = [] if self.checkpoint.stem in ("best", "last") else [self.checkpoint.stem]
        return "/".join([*self.folder.absolute().parts[-2:], *own])

    @cached_property
    def config(self) -> dict[str, Any]:
        """The configuration that the run was fitted with; empty for a .nern file.

        Raises:
            UsageError: If the folder has none, or it cannot be read.
        """
        if self.is_file:
            return {}
        file = self.folder / "config.yaml"
        if not file.is_file():
            raise UsageError(
                f"{self.folder} has no config.yaml, which says what data the run was fitted with; pass a folder that "
                "`nernlit fit` wrote."
            )
        return read_config(file)

    def representation(self) -> Representation:
        """The representation in the checkpoint or .nern file, on the CPU."""
        return self._representation

    @cached_property
    def _representation(self) -> Representation:
        return load_representation(self.checkpoint, original=self.original)[0].eval()

    @cached_property
    def save_options(self) -> dict[str, Any]:
        """The options of `Representation.save` that the fit's `rate` states; none for other fits and .nern files."""
        rate = None if self.is_file else read_checkpoint(self.checkpoint).get("hyper_parameters", {}).get("rate")
        return {name: rate[name] for name in ("kept", "fold_batch_norm")} if isinstance(rate, dict) else {}

    def sizes(self) -> Sizes:
        """The sizes of the .nern file; for a fit, those of the file that `export` writes."""
        sizes = self._representation.sizes(**self.save_options)
        return replace(sizes, file_bytes=self.checkpoint.stat().st_size) if self.is_file else sizes

    @cached_property
    def step(self) -> int:
        """Optimizer steps of the checkpoint; 0 for a .nern file."""
        return 0 if self.is_file else int(read_checkpoint(self.checkpoint)["global_step"])

    def rounds(self) -> list[EndedRound]:
        """The rounds of a Progressive fit, the first one first.

        Raises:
            UsageError: If it is no such fit, or its record is damaged.
        """
        if self.is_file:
            raise UsageError(f"{self.checkpoint} is a .nern file, which holds no rounds; pass the folder of the fit.")
        return read_rounds(self.folder)

    @property
    def has_rounds(self) -> bool:
        """Whether it is a Progressive fit."""
        return not self.is_file and rounds_record(self.folder).is_file()

    def data(self, overrides: Sequence[str] = ()) -> ImageDataModule:
        """The run's data, with overrides as on the command line (`--data.root=DIR`).

        Raises:
            UsageError: If the run has no data of its own and the overrides name none, or they name further test sets.
        """
        if any(re.match(r"--data(\.init_args)?\.eval_sets\b", option) for option in overrides):
            raise UsageError("--data.eval_sets is for `nernlit test`; leave it out.")
        own = self.config.get("data")
        if own is None and not any(option.startswith("--data=") for option in overrides):
            reason = f"{self.checkpoint} names no data" if self.is_file else f"{self.folder} was fitted without data"
            raise UsageError(f"{reason}; name it: --data=CIFAR10DataModule --data.root=DIR.")
        return data_module([*(["--data", json.dumps(own, default=str)] if own is not None else []), *overrides])

    def batches(
        self, split: Split, images: int | None = None, overrides: Sequence[str] = (), at_most: int | None = None
    ) -> Batches:
        """Pixels in [0, 1] and labels of the test images, or of the training images that are not held out for
        validation; without augmentation.

        Args:
            split: Which.
            images: Number of images, drawn with a fixed seed; all by default.
            overrides: Options that replace those of the run's data.
            at_most: As `images`, but a split with fewer images is used whole.

        Raises:
            UsageError: If the split has fewer than `images`.
        """
        data = self.data(overrides)
        if not data.has_images:
            reason = "--data has no images" if self.is_file else f"{self.folder} was fitted without images"
            raise UsageError(f"{reason}; name a dataset (--data CLASS and its options).")
        data.network = self.representation().original
        data.prepare_data()
        source = data.images(split)
        if images is not None and images > len(source):
            raise UsageError(f"--images {images}: the {split} split has {len(source)} images; pass fewer.")
        chosen = torch.randperm(len(source), generator=torch.Generator().manual_seed(0))[: images or at_most]
        return Batches(data, source.subset(chosen.sort().values))


def data_module(options: Sequence[str]) -> ImageDataModule:
    """The data that options name as on the command line: `--data=CLASS`, `--data.root=DIR`; null has no images."""
    parser = ArgumentParser(exit_on_error=False, allow_abbrev=False)
    parser.add_subclass_arguments(ImageDataModule, "data")
    data: ImageDataModule | None = parser.instantiate(parser.parse_args(list(options))).data
    return NoImages() if data is None else data


def require_dataset(data: ImageDataModule | None) -> None:
    """Refuse data without images, for commands that measure accuracies.

    Raises:
        UsageError: If there are none.
    """
    if data is None or not data.has_images:
        raise UsageError("--data has no images; name a dataset, for example --data CIFAR10DataModule --data.root DIR.")
