"""Lock files for folders: at most one process, on any machine, works in a folder at a time.

A claim on `runs/a` is a file `runs/claim.a.1`, which only one process can create. It says which process holds it. If
that process has ended without removing its claim, another one takes over by creating `claim.a.2`, which again only one
can do, and so on; the highest number counts. The files with lower numbers stay until the work is done: if a number
were reused, two processes could hold a claim at once: one that saw the old file, and one that created the new file.
"""

import contextlib
import glob
import json
import math
import os
import platform
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

#: Seconds between two heartbeats, which update the modification time of the claim's file.
HEARTBEAT_SECONDS = 20.0
#: Seconds without a heartbeat after which a process on another machine is considered dead.
STALE_SECONDS = 300.0
_WAIT_SECONDS = 0.1
#: Start times of processes are compared with this tolerance in seconds.
_SAME_START = 2.0


@contextmanager
def claim(folder: Path) -> Iterator[bool]:
    """Hold the claim on a folder during the block, unless another process that still runs holds it.

    A process of this machine still runs if there is one with its number and its start time. One of another machine is
    assumed to run as long as the file of its claim is at most five minutes old.

    Args:
        folder: The folder, which need not exist. Folders above it are created, and removed if they are empty at the
            end.

    Yields:
        Whether this process holds the claim.
    """
    made = [above for above in folder.parents if not above.exists()]
    own = _create(folder)
    if own is None:
        yield False
        return
    ended = threading.Event()
    beating = threading.Thread(target=_beat, args=(own, ended), daemon=True)
    beating.start()
    try:
        yield True
    finally:
        ended.set()
        beating.join()
        own.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # not empty
            for above in made:
                above.rmdir()


@contextmanager
def awaited_claim(folder: Path) -> Iterator[None]:
    """Hold the claim on a folder during the block, which begins when no other process holds it."""
    while True:
        with claim(folder) as is_ours:
            if is_ours:
                yield
                return
        time.sleep(_WAIT_SECONDS)


def is_claimed(folder: Path) -> bool:
    """Whether a process that still runs holds a folder."""
    claims = _claims(folder)
    return bool(claims) and _is_held(claims[-1])


def remove_claims(folder: Path) -> None:
    """Remove all claims on a folder in which the work is done, also those of ended processes."""
    for file in _claims(folder):
        file.unlink(missing_ok=True)


def _create(folder: Path) -> Path | None:
    """The new claim of this process; None if another one holds the folder."""
    while True:
        folder.parent.mkdir(parents=True, exist_ok=True)
        claims = _claims(folder)
        if claims and _is_held(claims[-1]):
            return None
        number = _number(claims[-1]) + 1 if claims else 1
        own = folder.with_name(f"claim.{folder.name}.{number}")
        try:
            file = own.open("x")
        except FileExistsError:
            return None
        except FileNotFoundError:  # another process removed the folder, which was empty
            continue
        try:
            with file:
                json.dump({"host": _host(), "pid": os.getpid(), "started": _started(os.getpid())}, file)
        except OSError:  # a full disk
            own.unlink(missing_ok=True)
            raise
        return own


def _claims(folder: Path) -> list[Path]:
    """The claims on a folder, the one that counts last."""
    files = folder.parent.glob(f"claim.{glob.escape(folder.name)}.*")
    return sorted((file for file in files if file.suffix[1:].isdecimal()), key=_number)


def _number(file: Path) -> int:
    return int(file.suffix[1:])


def _is_held(file: Path) -> bool:
    """Whether the process that created a claim still runs."""
    try:
        holder = json.loads(file.read_bytes())
        if holder["host"] == _host():
            return abs(_started(holder["pid"]) - float(holder["started"])) < _SAME_START
    except FileNotFoundError:
        return True  # removed a moment ago: its number is free again, and the next one must not be taken
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        pass  # it is being written, or its process ended before it was
    return not _is_stale(file)


def _is_stale(file: Path) -> bool:
    """Whether a file is old by the clock of its file system, which that of this machine may differ from."""
    with tempfile.TemporaryFile(dir=file.parent) as new:  # without a name, which a killed process would leave
        now = os.fstat(new.fileno()).st_mtime
    try:
        return now - file.stat().st_mtime > STALE_SECONDS
    except FileNotFoundError:
        return False


def _host() -> str:
    """This machine, and on Linux the namespace of its process numbers, which a container may have for itself."""
    try:
        return f"{platform.node()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return platform.node()


def _started(pid: int) -> float:
    """When a process started, in seconds since the machine did, which no change of the clock moves; NaN if it ended."""
    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return math.nan
        booted = psutil.boot_time()
        return process.create_time() - booted
    except psutil.NoSuchProcess:
        return math.nan


def _beat(own: Path, ended: threading.Event) -> None:
    while not ended.wait(HEARTBEAT_SECONDS):
        with contextlib.suppress(OSError):
            os.utime(own)
