"""Fault injection for file writes: the n-th call that changes files fails, or ends the process (see SQLite's tests)."""

import builtins
import errno
import io
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

#: Functions of `os` that change names or contents, and which of their arguments is the path or the descriptor.
_FUNCTIONS = ("fsync", "replace", "rename", "link", "symlink", "mkdir", "unlink", "remove", "rmdir", "truncate", "open")


class Faults:
    """Counts the calls that change files below a folder, and acts at the n-th.

    Args:
        folder: Other files are left alone.
        nth: Number of the call, from 1.
        code: The error number of a call that fails; None ends the process with SIGKILL.
        lasting: Whether all later calls fail too.

    Attributes:
        calls: The calls so far, such as `write last.ckpt`.
    """

    def __init__(self, folder: Path, nth: int, code: int | None = errno.ENOSPC, lasting: bool = False) -> None:
        self.folder, self.nth, self.code, self.lasting = os.path.abspath(folder), nth, code, lasting
        self.calls: list[str] = []

    @property
    def happened(self) -> bool:
        """Whether a call failed."""
        return len(self.calls) >= self.nth

    def call(self, name: str, file: Any, torn: Callable[[], object] = lambda: None) -> None:
        """Note a call, and let it fail if it is its turn.

        Args:
            name: Of the call.
            file: Path or descriptor.
            torn: What a call that fails still does.
        """
        path = self.path_of(file)
        if path is None:
            return
        self.calls.append(f"{name} {os.path.relpath(path, self.folder)}")
        if len(self.calls) == self.nth or (self.lasting and self.happened):
            torn()
            if self.code is None:
                os.kill(os.getpid(), signal.SIGKILL)
            else:
                raise OSError(self.code, os.strerror(self.code), *([] if isinstance(file, int) else [path]))

    def path_of(self, file: Any) -> str | None:
        """The path of a file or descriptor below the folder; None for others."""
        try:
            path = os.readlink(f"/proc/self/fd/{file}") if isinstance(file, int) else os.path.abspath(os.fspath(file))
        except (OSError, TypeError):
            return None
        return path if isinstance(path, str) and path.startswith(self.folder) else None


@contextmanager
def failing(folder: Path, nth: int, code: int | None = errno.ENOSPC, lasting: bool = False) -> Iterator[Faults]:
    """A context in which the n-th call that changes files below a folder fails. See `Faults`."""
    faults = Faults(folder, nth, code, lasting)
    with pytest.MonkeyPatch.context() as patch:
        for name in _FUNCTIONS:
            patch.setattr(os, name, _counted(faults, name, getattr(os, name)))
        opened = _opening(faults, io.open)
        patch.setattr(io, "open", opened)
        patch.setattr(builtins, "open", opened)
        yield faults


def _counted(faults: Faults, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def called(file: Any, *args: Any, **options: Any) -> Any:
        faults.call(name, file)
        return function(file, *args, **options)

    return called


class _File(io.FileIO):
    """A file each of whose writes may fail half-way."""

    faults: Faults

    def write(self, content: Any) -> int:
        half = memoryview(content)[: len(content) // 2]
        self.faults.call("write", self.fileno(), lambda: super(_File, self).write(half))
        return super().write(content)


def _opening(faults: Faults, function: Callable[..., Any]) -> Callable[..., Any]:
    def called(
        file: Any,
        mode: str = "r",
        buffering: int = -1,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
        **options: Any,
    ) -> Any:
        if not set(mode) & set("wax+") or faults.path_of(file) is None:
            return function(file, mode, buffering, encoding, errors, newline, **options)
        faults.call("create", file)
        raw = _File(file, mode.replace("b", "").replace("t", ""), opener=options.get("opener"))
        raw.faults = faults
        if buffering == 0:
            return raw
        buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding, errors, newline)

    return called
