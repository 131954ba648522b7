"""Atomic writing of files."""

import contextlib
import csv
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nernlit.errors import StorageError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Ends the names of files that are being written; a killed process may leave one behind.
UNFINISHED = ".part"


def write_atomically(path: Path, content: bytes | memoryview) -> None:
    """Write a file atomically, and create its folders: a reader never sees a partial file, even after a power failure.

    The content is written to a hidden file in the same folder and synced to disk; then the file is renamed. Until then,
    and if this fails, the previous file does not change.

    Raises:
        StorageError: If the file cannot be written: no space, no permission, a failing disk.
    """
    unfinished = path.with_name(f".{path.name}.{os.getpid()}{UNFINISHED}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with unfinished.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(path)
        finally:
            with contextlib.suppress(OSError):
                unfinished.unlink(missing_ok=True)
        _sync_folder(path.parent)
    except OSError as error:
        raise StorageError(
            f"cannot write {path}: {error.strerror or error}; free space or choose another folder, and run it again."
        ) from error


def _sync_folder(folder: Path) -> None:
    """Make a new name in a folder survive a power failure. Not every system can open folders."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_figure(path: Path, figure: "Figure") -> None:
    """Write a matplotlib figure as PNG."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=150)
    write_atomically(path, content.getvalue())


def write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows of the same columns, at least one, as CSV."""
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, fieldnames=list(rows[0]))
    table.writeheader()
    table.writerows(rows)
    write_atomically(path, text.getvalue().encode())
