"""Atomic writing of files."""

import contextlib
import csv
import errno
import fcntl
import glob
import io
import os
import secrets
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from nernlit.errors import StorageError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Ends the names of files that are being written; a killed process may leave one behind.
UNFINISHED = ".part"
#: Error numbers of file systems that cannot sync folders, such as some network file systems.
_CANNOT_SYNC = (errno.EINVAL, errno.EBADF, errno.ENOTSUP)


def write_atomically(path: Path, content: bytes | memoryview) -> None:
    """Write a file atomically, and create its folders: a reader never sees a partial file, even after a power failure.

    The content is written to a hidden file in the same folder and synced to disk; then the file is renamed. Until then,
    and if this fails, the previous file does not change. Several processes may write the same file at once: the last
    one wins. Hidden files of processes that were killed while they wrote the same file are removed.

    Raises:
        StorageError: If the file cannot be written: no space, no permission, a failing disk.
    """
    try:
        if path.exists() and not path.is_file() and not path.is_dir():
            raise StorageError(f"cannot write {path}: it is a device or a pipe; expected a file.")
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_unfinished(path.parent.glob(f".{glob.escape(_shortened(path.name))}.*"))
        file = _create_unfinished(path)
        unfinished = Path(file.name)
        try:
            with file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
                unfinished.replace(path)  # before it is closed, which ends its lock
        except BaseException:
            with contextlib.suppress(OSError):
                unfinished.unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)
    except OSError as error:
        raise StorageError(
            f"cannot write {path}: {error.strerror or error}; free space or choose another folder, and run it again."
        ) from error


def _shortened(name: str) -> str:
    """A file name to which a hidden file's ending can be added: file systems allow 255 bytes."""
    return os.fsdecode(os.fsencode(name)[:200])


def _create_unfinished(path: Path) -> BinaryIO:
    """A new hidden file beside `path`, locked as long as it is open."""
    while True:
        file = path.with_name(f".{_shortened(path.name)}.{secrets.token_hex(4)}{UNFINISHED}").open("xb")
        _lock(file, fcntl.LOCK_EX)
        if os.fstat(file.fileno()).st_nlink:
            return file
        file.close()  # another process removed it before it was locked


def remove_unfinished(paths: Iterable[Path]) -> None:
    """Remove the hidden files among paths that killed processes left; not those that are being written."""
    for left in paths:
        if left.name.startswith(".") and left.name.endswith(UNFINISHED):
            with contextlib.suppress(OSError), left.open("r+b") as file:
                if _lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB):
                    left.unlink()


def _lock(file: BinaryIO, operation: int) -> bool:
    """Lock an open file; False if another process has it locked, or on a file system without locks."""
    try:
        fcntl.flock(file, operation)
    except OSError:
        return False
    return True


def _sync_folder(folder: Path) -> None:
    """Make a new name in a folder survive a power failure, on file systems that can sync folders."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:  # files can be created in it, but it cannot be read
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC:
            raise
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
