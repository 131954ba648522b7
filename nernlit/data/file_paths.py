"""Paths of many files in little memory."""

import os
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Self, final, overload

import torch
from torch import Tensor


@final
class FilePaths(Sequence[Path]):
    """The paths of files, in three tensors.

    A million paths of 60 bytes take 76 MB; as `Path` objects they would take 400 MB. Processes that read images share
    the tensors' memory, but would each get copies of Python objects, whose reference counts change when they are read.

    Args:
        characters: All paths, one after the other, as bytes of the file system's encoding.
        starts: (N,) where each path begins in `characters`.
        ends: (N,) where it ends.
    """

    def __init__(self, characters: Tensor, starts: Tensor, ends: Tensor) -> None:
        self._characters, self._starts, self._ends = characters, starts, ends

    @classmethod
    def from_paths(cls, paths: Iterable[str | Path]) -> Self:
        """The paths, read one by one.

        >>> FilePaths.from_paths(["a/b", "c"])[1]
        PosixPath('c')
        """
        characters, ends = bytearray(), array("q", [0])
        for path in paths:
            characters += os.fsencode(path)
            ends.append(len(characters))
        bounds = torch.tensor(ends, dtype=torch.long)
        return cls(torch.frombuffer(characters or bytearray(1), dtype=torch.uint8), bounds[:-1], bounds[1:])

    def subset(self, indices: Tensor) -> Self:
        """The paths with these indices."""
        return type(self)(self._characters, self._starts[indices], self._ends[indices])

    def __len__(self) -> int:
        return len(self._starts)

    @overload
    def __getitem__(self, index: int) -> Path: ...
    @overload
    def __getitem__(self, index: slice) -> "FilePaths": ...
    def __getitem__(self, index: int | slice) -> "Path | FilePaths":
        if isinstance(index, slice):
            return self.subset(torch.arange(len(self))[index])
        start, end = int(self._starts[index]), int(self._ends[index])
        return Path(os.fsdecode(self._characters[start:end].numpy().tobytes()))
