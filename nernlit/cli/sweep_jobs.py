"""Running the fits of a sweep in parallel child processes on this machine."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import final

import torch
from rich.console import Group
from rich.live import Live
from rich.text import Text

from nernlit.cli.main import ERROR, GLOBAL_OPTIONS
from nernlit.cli.sweep_plan import Fit, Sweep
from nernlit.cli.sweep_results import is_finished
from nernlit.cli.sweep_run import Outcome
from nernlit.errors import NernlitError
from nernlit.utilities.progress import CONSOLE, duration
from nernlit.utilities.signals import SIGNALS, Interrupted

_POLL_SECONDS = 0.2
#: Bytes at the end of a log that are read for its last line.
_END_OF_LOG = 4096
#: Lines of a log that are shown where a fit failed.
_SHOWN_LINES = 10


@final
@dataclass
class Job:
    """A fit that runs in a child process.

    Attributes:
        fit: The fit.
        slot: A number from 0 that no other running fit has.
        process: The process.
        log: What it prints, after what earlier processes of the same fit printed.
        skipped: The bytes that those printed.
        began: When it was started, by `time.monotonic`.
    """

    fit: Fit
    slot: int
    process: subprocess.Popen[bytes]
    log: Path
    skipped: int
    began: float

    def lines(self, most: int | None = None) -> list[str]:
        """The lines that it has printed: all, or those in so many bytes at the end."""
        with self.log.open("rb") as file:
            file.seek(self.skipped if most is None else max(self.skipped, self.log.stat().st_size - most))
            return file.read().decode(errors="replace").splitlines()


def run_side_by_side(sweep: Sweep, waiting: Sequence[Fit], outcome: Outcome) -> None:
    """Run fits in child processes, which divide the CPU threads and, if there are several, the GPUs.

    Args:
        sweep: The sweep.
        waiting: Its fits to run.
        outcome: Its outcome so far; `jobs` is the number of processes that run at the same time.

    Raises:
        Interrupted: If a signal arrived. It was passed on to all child processes, and all have ended.
        NernlitError: If a child process found something wrong that concerns all fits.
    """
    queue, running = list(waiting), list[Job]()
    threads = max(1, torch.get_num_threads() // max(1, min(outcome.jobs, len(queue))))
    SIGNALS.restart()  # a caller that went on after an interruption runs this sweep
    SIGNALS.hold()
    # Standard output may be a file while the terminal shows the progress.
    live = Live(console=CONSOLE, transient=True, auto_refresh=False, redirect_stdout=sys.stdout.isatty())
    try:
        with live if CONSOLE.is_interactive else nullcontext():
            while queue or running:
                if SIGNALS.received is not None:
                    raise Interrupted(SIGNALS.received)
                while queue and len(running) < outcome.jobs:
                    outcome.print_start(queue[0], len(running))
                    slot = min(set(range(outcome.jobs)) - {job.slot for job in running})
                    running.append(_start(sweep, queue.pop(0), slot, threads))
                time.sleep(_POLL_SECONDS)
                for job in [job for job in running if job.process.poll() is not None]:
                    running.remove(job)
                    _end(sweep, job, outcome)
                if CONSOLE.is_interactive:
                    live.update(progress_lines(running), refresh=True)
    except Interrupted as interrupted:
        interrupted.message = (
            f"interrupted; {outcome.finished} of {outcome.total} fits are in {sweep.table}, "
            "and the same command continues with the others"
        )
        raise
    finally:
        for job in running:
            job.process.send_signal(SIGNALS.received or signal.SIGTERM)
        for job in running:
            job.process.wait()
        SIGNALS.release()


def progress_lines(running: Iterable[Job]) -> Group:
    """A line per running fit: its name and the last line that it printed, cropped at the edge of the terminal."""
    lines = [f"{job.fit.name}: {(job.lines(_END_OF_LOG) or ['starting'])[-1]}" for job in running]
    return Group(*(Text(line, no_wrap=True, overflow="ellipsis") for line in lines))


def environment(slot: int, threads: int) -> dict[str, str]:
    """The environment of a child process.

    Args:
        slot: A number from 0 that no other running fit has.
        threads: The most CPU threads that it may use.
    """
    # Unbuffered, so that a log has the lines of stdout and stderr in their order.
    shared = dict(os.environ, OMP_NUM_THREADS=str(threads), MKL_NUM_THREADS=str(threads), PYTHONUNBUFFERED="1")
    if (devices := torch.cuda.device_count()) > 1:
        listed = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = listed.split(",") if listed else [str(number) for number in range(devices)]
        shared["CUDA_VISIBLE_DEVICES"] = names[slot % devices]
    return shared


def child_command(sweep: Sweep, fit: Fit) -> list[str]:
    """The program and the arguments of a child process."""
    return [sys.executable, "-m", "nernlit", *sweep.command(fit), *GLOBAL_OPTIONS.get()]


def _start(sweep: Sweep, fit: Fit, slot: int, threads: int) -> Job:
    folder = sweep.folder(fit)
    log = folder.with_name(f"log.{folder.name}.txt")
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        skipped = output.tell()
        process = subprocess.Popen(
            child_command(sweep, fit),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment(slot, threads),
            process_group=0,  # Ctrl-C reaches this process only, which passes it on once
        )
        return Job(fit, slot, process, log, skipped, time.monotonic())


def _end(sweep: Sweep, job: Job, outcome: Outcome) -> None:
    """Record how a child process ended."""
    seconds, code = time.monotonic() - job.began, job.process.returncode
    if is_finished(sweep.folder(job.fit)):
        outcome.finished += 1
        outcome.seconds.append(seconds)
        print(f"finished after {duration(seconds)}: {job.fit.name}", flush=True)
        return
    if code == 0:
        outcome.claimed_by_others.append(job.fit)
        return
    lines = job.lines()
    prefix = f"{ERROR}{job.fit.name}: "
    found = next((number for number, line in enumerate(lines) if line.startswith(prefix)), None)
    errors = [line.removeprefix(ERROR) for line in lines if line.startswith(ERROR)]
    if found is None and errors:  # of no fit: an option that no fit has, a table that cannot be written
        raise NernlitError(errors[-1])
    if found is None:
        end = f"exit code {code}" if code > 0 else signal.Signals(-code).name
        outcome.fail(job.fit, f"its process ended with {end}")
    else:
        outcome.fail(job.fit, lines[found].removeprefix(prefix))
    shown = [line for line in lines[:found] if line.strip()][-_SHOWN_LINES:]
    print(f"last lines of {job.log}:", *shown, sep="\n  ", file=sys.stderr, flush=True)
