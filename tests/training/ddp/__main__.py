"""A program for the tests: run the cases of `cases.py` in one, two or more processes at a time (CPU, gloo).

    python -m tests.training.ddp FOLDER PROCESSES:CASE,CASE,... [PROCESSES:CASE,CASE,... ...]

Each argument is a group of processes that run the cases one after another. Each process saves what a case returns as
`FOLDER/CASE.PROCESSES.RANK` and, if it fails, its traceback as `FOLDER/CASE.PROCESSES.RANK.error`. A new group then
goes on with the next case.

PyTorch and Lightning are imported once; all processes are forked from this one.
"""

import multiprocessing
import os
import socket
import sys
import time
import traceback
from pathlib import Path

import torch

from nernlit.callbacks import throughput
from tests.training.ddp.cases import CASES
from tests.training.ddp.group import Group

#: Seconds after which a case counts as hanging.
TIMEOUT = 120


def work(group: Group, cases: list[str]) -> None:
    os.environ["LOCAL_RANK"] = str(group.rank)  # tells Lightning that the processes of the group exist already
    group.watch_files()
    for case in cases:
        try:
            outcome = CASES[case](group.of(case))
        except BaseException:
            group.file(case, ".error").write_text(traceback.format_exc())
            os._exit(1)  # the others of the group notice and fail too
        torch.save(outcome, group.file(case))


def run_group(folder: Path, processes: int, cases: list[str]) -> list[str]:
    """Run the cases, and return those that are left after the first that failed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free.getsockname()[1]))
    groups = [Group(folder, processes, rank) for rank in range(processes)]
    forked = multiprocessing.get_context("fork")
    workers = [forked.Process(target=work, args=(group, cases)) for group in groups]
    for worker in workers:
        worker.start()
    ended = [0] * processes
    since = time.monotonic()
    while any(worker.is_alive() for worker in workers):
        time.sleep(0.05)
        now = [sum(group.file(case).is_file() for case in cases) for group in groups]
        if now != ended:
            ended, since = now, time.monotonic()
        if time.monotonic() - since > TIMEOUT:
            for worker, group, done in zip(workers, groups, ended, strict=True):
                if worker.is_alive():
                    worker.kill()
                    worker.join()
                    group.file(cases[min(done, len(cases) - 1)], ".error").write_text(f"ran for {TIMEOUT} s")
    done = max(sum(group.file(case).is_file() for case in cases) for group in groups)
    failed = [case for case in cases if any(group.file(case, ".error").is_file() for group in groups)]
    return cases[max(done, cases.index(failed[-1]) + 1) :] if failed else []


def main(folder: Path, groups: list[str]) -> None:
    for described in groups:
        processes, _, cases = described.partition(":")
        left = cases.split(",")
        while left:
            left = run_group(folder, int(processes), left)


if __name__ == "__main__":
    torch.set_num_threads(1)
    throughput._SIDE = 64  # the time of a product of large matrices, on every process, tests nothing
    main(Path(sys.argv[1]), sys.argv[2:])
