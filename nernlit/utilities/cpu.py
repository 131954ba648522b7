"""How many CPU threads to use beside the other programs on the machine.

PyTorch's threads wait for each other in every operation, and wait by spinning. Where another program takes one of their
cores, all of them wait for the thread that has lost it: on two cores, a loop of small steps falls to a fifth of its
speed, while one thread alone keeps its own. So a process uses the cores that others leave free.
"""

import os
import time
from dataclasses import dataclass
from typing import Self, final

import psutil
import torch

#: Cores that others may use before a thread is given up: a fit beside a browser keeps all of its threads.
_ROUND_UP = 0.5
#: Seconds that a reading needs at least; the system counts in hundredths of a second.
_SHORTEST = 0.2


@dataclass(frozen=True)
class _Reading:
    """CPU time so far, in core-seconds: of all programs on the cores that this process may use, and its own."""

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
        return cls(time.monotonic(), busy, time.process_time())


@final
class OtherPrograms:
    """Measures how many cores other programs use, of those that this process may use."""

    def __init__(self) -> None:
        process = psutil.Process()
        # macOS has no affinity.
        allowed = process.cpu_affinity() if hasattr(process, "cpu_affinity") else range(os.cpu_count() or 1)
        self.allowed = list(allowed or [0])
        self._last = _Reading.now(self.allowed)
        self._cores = 0.0

    def cores(self) -> float:
        """Cores' worth of CPU time that other programs took since the last call, between 0 and all."""
        now, last = _Reading.now(self.allowed), self._last
        seconds = now.at - last.at
        if seconds >= _SHORTEST:
            used = (now.everyone - last.everyone - (now.own - last.own)) / seconds
            self._cores, self._last = min(max(0.0, used), len(self.allowed)), now
        return self._cores

    def free_threads(self, most: int) -> int:
        """Threads that find a core of their own, from 1 to `most`, by what others took since the last call."""
        return max(1, min(most, int(len(self.allowed) - self.cores() + _ROUND_UP)))


#: Reads from the start of the program: what happens while it is imported says what else runs on the machine.
other_programs = OtherPrograms()


def use_free_cores() -> None:
    """Give PyTorch as many threads as find a core of their own now, and no more than it has."""
    torch.set_num_threads(other_programs.free_threads(torch.get_num_threads()))
