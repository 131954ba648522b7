import fcntl
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import pytest

from nernlit.errors import StorageError
from nernlit.storage.files import write_atomically, write_table


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """As on a full disk: a write of more fails half-way."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_failed_write_leaves_the_former_file_and_nothing_else() -> None:
    file = Path("folder/table.csv")
    write_atomically(file, b"former")
    with files_of_at_most(1000), pytest.raises(StorageError, match=r"cannot write folder/table\.csv: File too large"):
        write_atomically(file, bytes(100_000))
    assert file.read_bytes() == b"former"
    assert list(file.parent.iterdir()) == [file]


def test_the_content_is_on_the_disk_before_the_name_is(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    synced, replaced = os.fsync, Path.replace

    def fsync(descriptor: int) -> None:
        events.append("folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file")
        synced(descriptor)

    def replace(self: Path, target: Path) -> Path:
        events.append("rename")
        return replaced(self, target)

    monkeypatch.setattr("os.fsync", fsync)
    monkeypatch.setattr(Path, "replace", replace)
    write_atomically(Path("file"), b"content")
    assert events == ["file", "rename", "folder"]


def test_a_failing_disk_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    write_atomically(Path("file"), b"former")
    monkeypatch.setattr("os.fsync", fails)
    with pytest.raises(StorageError, match="cannot write file: Input/output error; free space or choose"):
        write_atomically(Path("file"), b"new")
    assert Path("file").read_bytes() == b"former"
    assert os.listdir() == ["file"]


def test_a_file_where_a_folder_is_needed_is_one_line() -> None:
    Path("runs").write_text("")
    with pytest.raises(StorageError, match=r"cannot write runs/sweep/sweep\.csv: (File exists|Not a directory)"):
        write_table(Path("runs/sweep/sweep.csv"), [{"a": 1}])


def test_the_unfinished_file_of_a_killed_process_is_removed() -> None:
    Path(".file.1.part").write_bytes(b"half")
    Path(".other.1.part").write_bytes(b"half")
    write_atomically(Path("file"), b"whole")
    assert Path("file").read_bytes() == b"whole"
    assert sorted(os.listdir()) == [".other.1.part", "file"]


def test_the_unfinished_file_of_a_running_process_stays() -> None:
    with Path(".file.1.part").open("wb") as running:
        fcntl.flock(running, fcntl.LOCK_EX)
        write_atomically(Path("file"), b"whole")
    assert sorted(os.listdir()) == [".file.1.part", "file"]


def test_a_file_that_was_removed_before_it_was_locked_is_created_again(monkeypatch: pytest.MonkeyPatch) -> None:
    locked: list[int] = []

    def flock(file: BinaryIO, operation: int) -> None:
        locked.append(operation)
        if len(locked) == 1:  # another process takes it for that of a killed one
            os.unlink(file.name)

    monkeypatch.setattr("fcntl.flock", flock)
    write_atomically(Path("file"), b"whole")
    assert locked == [fcntl.LOCK_EX, fcntl.LOCK_EX]
    assert os.listdir() == ["file"]


@pytest.mark.parametrize("name", ["n" * 255, "\N{SNOWMAN}" * 85])
def test_the_longest_names_can_be_written(name: str, tmp_path: Path) -> None:
    write_atomically(tmp_path / name, b"content")
    assert (tmp_path / name).read_bytes() == b"content"
    assert len(list(tmp_path.iterdir())) == 1
