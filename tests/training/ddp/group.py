"""Processes that run cases together."""

import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

#: Kernels, and images, of a step: of all processes together.
JOINT = 64
#: Audit events after which a file or folder has another content or name.
_CHANGES = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.link", "os.symlink")


@dataclass(frozen=True)
class Group:
    """One of several processes that run cases together."""

    folder: Path
    processes: int
    rank: int
    case: str = ""

    def of(self, case: str) -> "Group":
        return replace(self, case=case)

    def file(self, case: str, suffix: str = "") -> Path:
        return self.folder / f"{case}.{self.processes}.{self.rank}{suffix}"

    @property
    def run(self) -> Path:
        """The folder of the case's run, shared by its processes."""
        return self.folder / f"{self.case}.{self.processes}.run"

    @property
    def batch_size(self) -> int:
        return JOINT // self.processes

    def watch_files(self) -> None:
        """Append to `FOLDER/written.PROCESSES.RANK` every path in a run's folder that this process writes or makes."""
        log = os.open(self.file("written"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        below = str(self.folder)

        def note(event: str, arguments: tuple[Any, ...]) -> None:
            if event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                written = arguments[0]
            elif event in _CHANGES:
                written = arguments[event == "os.rename"]
            else:
                return
            if isinstance(written, str | Path) and str(written).startswith(below):
                relative = Path(written).relative_to(below)
                if relative.parts and relative.parts[0].endswith(".run"):
                    os.write(log, f"{event} {relative}\n".encode())

        sys.addaudithook(note)
