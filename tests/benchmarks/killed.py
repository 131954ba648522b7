"""Helpers of `kill` and `soak`: run commands in child processes, kill them, and compare the remaining files."""

import csv
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# Some are imported before the forks, which need them.
import matplotlib.pyplot as plt  # noqa: F401
import numba  # noqa: F401
import optuna
import psutil
import sklearn.datasets  # noqa: F401
import torch
import torch.utils.tensorboard
from optuna.trial import TrialState

from nernlit.callbacks import RepresentationFigures
from nernlit.cli import compare, compress, export, report, search, sweep  # noqa: F401
from nernlit.cli.main import main
from nernlit.cli.runs import version_of
from nernlit.coding import NernFile
from nernlit.storage.checkpoint import read_checkpoint
from tests.faults import failing

DONE, KILLED = "done", "killed"
#: Columns of tables that differ from one run to the next.
_MEASURED = ("fit_seconds", "steps_per_second", "peak_memory_mib")


def prepare() -> None:
    """Set up this process, of which the commands are forks."""
    torch.set_num_threads(1)
    RepresentationFigures._draw = lambda *_: None  # type: ignore[method-assign]  # a third of the time of a short fit


@dataclass
class Run:
    """One process of a command.

    Attributes:
        outcome: How it ended: `done`, `killed`, or its exit code.
        calls: The calls that changed files; 0 for a killed one.
        seconds: How long it took.
        said: What it printed.
    """

    outcome: str
    calls: int
    seconds: float
    said: str


@dataclass(frozen=True)
class Moment:
    """When a process is killed; by default never.

    Attributes:
        call: Number of the call that changes files; half of what it writes is written.
        after: Seconds after the start.
    """

    call: int | None = None
    after: float | None = None

    @classmethod
    def draw(cls, numbers: random.Random, undisturbed: Run) -> "Moment":
        """A random moment of a command, with equal chances of both kinds if it writes files."""
        if undisturbed.calls and numbers.random() < 0.5:
            return cls(call=numbers.randint(1, undisturbed.calls))
        return cls(after=numbers.uniform(0, undisturbed.seconds))


def run(args: Sequence[str], folder: Path, temporary: Path, moment: Moment = Moment()) -> Run:
    """Run a command in a folder, in a process of its own. If it is killed, so are the processes that it started.

    Args:
        args: The command.
        folder: Its working directory.
        temporary: Folder of its temporary files.
        moment: When it is killed.
    """
    began = time.monotonic()
    log = folder / "log"
    log.touch()
    earlier = log.stat().st_size
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os._exit(_child(args, folder, temporary, moment.call, writer))
    os.close(writer)
    deadline = None if moment.after is None else began + moment.after
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            break
        if deadline is not None and time.monotonic() >= deadline:
            os.kill(pid, signal.SIGKILL)
            deadline = None
        time.sleep(0.002)
    _kill_session(pid)
    for claim in folder.rglob("claim.*"):  # one that was half written counts for five minutes: let them pass
        os.utime(claim, (0, 0))
    with os.fdopen(reader, "rb") as pipe:
        calls = int(pipe.read() or 0)
    code = os.waitstatus_to_exitcode(status)
    outcome = {0: DONE, -signal.SIGKILL: KILLED}.get(code, f"exit code {code}")
    said = log.read_bytes()[earlier:].decode(errors="replace")
    return Run(outcome, calls, time.monotonic() - began, said)


def _child(args: Sequence[str], folder: Path, temporary: Path, call: int | None, writer: int) -> int:
    try:
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.chdir(folder)
        log = os.open("log", os.O_WRONLY | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ["TMPDIR"], tempfile.tempdir = str(temporary), None
        with failing(folder, call or sys.maxsize, code=None) as faults:
            main(args)
        os.write(writer, str(len(faults.calls)).encode())
    except SystemExit as ended:
        return int(ended.code or 0)
    except BaseException:
        traceback.print_exc()
        return 70
    return 0


def _kill_session(session: int) -> None:
    """Kill the processes that a process has started, and wait until they have ended."""

    def left() -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter(["status"]):
            try:
                if os.getsid(process.pid) == session and process.info["status"] != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except ProcessLookupError:
                continue
        return found

    while processes := left():
        for process in processes:
            process.kill()
        time.sleep(0.01)


def contents(folder: Path) -> dict[str, object]:
    """What a finished command leaves: the files in `out`, and weights and rounds of the newest run of each name."""
    found: dict[str, object] = {f"unfinished {file}": None for file in folder.rglob("*.part")}
    for file in folder.glob("out/*.*"):
        if file.suffix == ".csv":
            with file.open(newline="") as table:
                rows = list(csv.DictReader(table))
            rows = [{key: row[key] for key in row if key not in _MEASURED} for row in rows]
            found[file.name] = sorted(rows, key=str)  # fits side by side may end in any order
        elif file.suffix == ".db":
            study = optuna.load_study(study_name=file.stem, storage=f"sqlite:///{file}")
            found[file.name] = [t.values for t in study.get_trials(states=(TrialState.COMPLETE,))]
        elif file.name.partition(".")[0] != "claim":
            found[file.name] = file.read_bytes()
    runs = [file.parent.parent for file in folder.glob("*/*/version_*/checkpoints/last.ckpt")]
    runs = [run for run in runs if run.parts[-3] in ("runs", "out")]
    for name in {run.parent.name for run in runs}:
        newest = max((run for run in runs if run.parent.name == name), key=version_of)
        for file in (*newest.glob("checkpoints/*.ckpt"), *newest.glob("rounds/*.ckpt")):
            content = read_checkpoint(file)
            state = {key: value for key, value in content["state_dict"].items() if isinstance(value, torch.Tensor)}
            found[f"{name} {file.name}"] = (content["global_step"], state)
        for file in (*newest.glob("rounds/*.json"), *newest.glob("rounds/*.safetensors")):
            found[f"{name} {file.name}"] = file.read_bytes()
    return found


def difference(one: dict[str, object], other: dict[str, object]) -> str | None:
    """The first thing in which two commands differ; None if they are equal to the bit."""
    if one.keys() != other.keys():
        return f"other files: {sorted(one.keys() ^ other.keys())}"
    for name, expected in one.items():
        found = other[name]
        if isinstance(expected, tuple) and isinstance(found, tuple):
            if expected[0] != found[0]:
                return f"{name}: step {found[0]} instead of {expected[0]}"
            for key, value in expected[1].items():
                if not torch.equal(value, found[1][key]):
                    return f"{name}: {key}"
        elif expected != found:
            return name
    return None


def require_whole(folder: Path) -> None:
    """Read all checkpoints and .nern files."""
    for file in folder.rglob("*.ckpt"):
        read_checkpoint(file)
    for file in folder.glob("out/*.nern"):
        NernFile.read(file)
