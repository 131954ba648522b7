"""The number of CPU threads to use when other programs run on the machine.

PyTorch's threads wait for each other after every operation, by spinning. If another program takes one of their cores,
all threads wait for the one that lost its core: on two cores, a loop of small steps falls to a fifth of its speed,
while a single thread keeps its speed. So a process should use only the cores that other programs leave free.
"""

import multiprocessing
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Self, final

import psutil
import torch

#: Load of other programs, in cores, that is ignored, such as that of a browser.
_IGNORED_LOAD = 0.5
#: Minimum time between two readings in seconds; the system counts CPU time in hundredths of a second.
_MIN_INTERVAL = 0.2


@dataclass(frozen=True)
class _Reading:
    """CPU time so far in core-seconds: of all programs on the cores that this process may use, and its own."""

    at: float
    everyone: float
    own: float

    @classmethod
    def now(cls, cores: list[int]) -> Self:
        per_core = psutil.cpu_times(percpu=True)
        idle = ("idle", "iowait", "guest", "guest_nice")  # Linux counts guests as user time too
        busy = sum(
            value
            for core in cores
            if core < len(per_core)
            for kind, value in per_core[core]._asdict().items()
            if kind not in idle
        )
        return cls(time.monotonic(), busy, time.process_time() + _children_seconds())


def _children_seconds() -> float:
    """CPU time of the processes that load images, also of those that have ended; running ranks do not count."""
    ended = os.times()
    total = ended.children_user + ended.children_system
    for child in multiprocessing.active_children():
        with suppress(psutil.Error):  # it has ended
            times = psutil.Process(child.pid).cpu_times()
            total += times.user + times.system
    return total


@final
class OtherPrograms:
    """Measures how many cores other programs use, of those that this process may use."""

    def __init__(self) -> None:
        process = psutil.Process()
        # macOS has no CPU affinity.
        allowed = process.cpu_affinity() if hasattr(process, "cpu_affinity") else range(os.cpu_count() or 1)
        self.allowed = list(allowed or [0])
        self._last = _Reading.now(self.allowed)
        self._cores = 0.0

    def cores(self) -> float:
        """The mean number of cores that other programs used since the last call, between 0 and `len(allowed)`."""
        now, last = _Reading.now(self.allowed), self._last
        seconds = now.at - last.at
        if seconds >= _MIN_INTERVAL:
            used = (now.everyone - last.everyone - (now.own - last.own)) / seconds
            self._cores, self._last = min(max(0.0, used), len(self.allowed)), now
        return self._cores

    def free_threads(self, most: int) -> int:
        """The number of threads, from 1 to `most`, for which other programs left a core free since the last call."""
        return max(1, min(most, int(len(self.allowed) - self.cores() + _IGNORED_LOAD)))


#: Measures from the import on, so that the first reading already shows what else runs on the machine.
other_programs = OtherPrograms()


_most_threads: ContextVar[int] = ContextVar("most_threads", default=0)


@contextmanager
def free_cores_only() -> Iterator[None]:
    """A context in which PyTorch has at most as many threads as other programs leave cores free at its start."""
    before = torch.get_num_threads()
    token = _most_threads.set(before)
    torch.set_num_threads(other_programs.free_threads(before))
    try:
        yield
    finally:
        torch.set_num_threads(before)
        _most_threads.reset(token)


def most_threads() -> int:
    """The number of PyTorch's threads, or what it was before `free_cores_only`."""
    return max(torch.get_num_threads(), _most_threads.get())
