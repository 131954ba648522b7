"""Kills runs at random moments and continues them: `python -m tests.benchmarks.kill --kills 200`.

Half of the kills (SIGKILL) come at a random time, half at a random call that writes a file, of which half is written.
A killed run is continued as the documentation says, and may be killed again; what it leaves at its end must be equal to
the bit to what an uninterrupted one leaves. After each kill all checkpoints and .nern files must be whole.

Every run is a fork of a process that has imported everything, and has its temporary files on another file system.
"""

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

# Some are imported before the forks, which need them.
import matplotlib.pyplot as plt  # noqa: F401
import numba  # noqa: F401
import sklearn.datasets  # noqa: F401
import torch
import torch.utils.tensorboard

from nernlit.callbacks import RepresentationFigures
from nernlit.cli import compress, export  # noqa: F401
from nernlit.cli.main import main
from nernlit.coding import NernFile
from nernlit.storage.checkpoint import read_checkpoint
from nernlit.utilities.tables import print_table
from tests.fakes import CONFIGS, QUICK
from tests.faults import failing
from tests.training.test_decoupled_distill import QUICK_DECOUPLED
from tests.training.test_progressive import QUICK_PROGRESSIVE

FIT = ["fit", "--ckpt_path=last"]  # of a run that has no checkpoint yet, it is the first call
_COMPRESS = ["compress", "digits_resnet8", "-o", "out/small.nern", "--data", "DigitsDataModule", "--epochs=3"]
RUNS = {
    "ReconOnly": [*FIT, *QUICK, "--trainer.max_epochs=4"],
    "BaselineJoint": [
        *FIT, "-c", str(CONFIGS / "digits_h96_baseline.yaml"), "--trainer.max_epochs=3", "--data.batch_size=400",
        "--trainer.check_val_every_n_epoch=1", "--model.warmup_steps=2", *QUICK[4:],
    ],
    "DecoupledDistill": [*FIT, *QUICK_DECOUPLED],
    "Progressive": [*FIT, *QUICK_PROGRESSIVE],
    "OriginalModule": [*FIT, "-c", str(CONFIGS / "digits_original.yaml"), "--trainer.max_epochs=3", *QUICK[5:]],
    "compress": [*_COMPRESS, "--data.batch_size=400", *QUICK[5:]],
    "compress --target_drop": [*_COMPRESS, "--target_drop=50", "--data.batch_size=400", *QUICK[5:]],
    "export": ["export", "runs/fit", "-o", "out/net.nern"],
}  # fmt: skip
_DONE, _KILLED = "done", "killed"


@dataclass
class Run:
    """One process of a command.

    Attributes:
        outcome: How it ended: `done`, `killed`, or its exit code.
        calls: The calls that changed files; 0 for a killed one.
        seconds: How long it took.
    """

    outcome: str
    calls: int
    seconds: float


def run(args: Sequence[str], folder: Path, temporary: Path, call: int | None = None, after: float | None = None) -> Run:
    """Run a command in a folder, in a process of its own.

    Args:
        args: The command.
        folder: Its working directory.
        temporary: Folder of its temporary files.
        call: Number of the call that changes files in which the process is killed.
        after: Seconds after which it is killed.
    """
    began = time.monotonic()
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os._exit(_child(args, folder, temporary, call, writer))
    os.close(writer)
    deadline = None if after is None else began + after
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            break
        if deadline is not None and time.monotonic() >= deadline:
            os.kill(pid, signal.SIGKILL)
            deadline = None
        time.sleep(0.002)
    with os.fdopen(reader, "rb") as pipe:
        calls = int(pipe.read() or 0)
    code = os.waitstatus_to_exitcode(status)
    outcome = {0: _DONE, -signal.SIGKILL: _KILLED}.get(code, f"exit code {code}")
    return Run(outcome, calls, time.monotonic() - began)


def _child(args: Sequence[str], folder: Path, temporary: Path, call: int | None, writer: int) -> int:
    try:
        os.chdir(folder)
        log = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
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


def contents(folder: Path) -> dict[str, object]:
    """What a finished command leaves: its .nern file, or else the weights and rounds of its newest run."""
    if files := {file.name: file.read_bytes() for file in folder.glob("out/*")}:
        return dict[str, object](files)
    found: dict[str, object] = {}
    runs = [file.parent.parent for file in folder.glob("runs/*/version_*/checkpoints/last.ckpt")]
    for name in {run.parent.name for run in runs}:
        newest = max((run for run in runs if run.parent.name == name), key=lambda run: int(run.name.split("_")[1]))
        for file in (*newest.glob("checkpoints/*.ckpt"), *newest.glob("rounds/*.ckpt")):
            content = read_checkpoint(file)
            state = {key: value for key, value in content["state_dict"].items() if isinstance(value, torch.Tensor)}
            found[f"{name} {file.name}"] = (content["global_step"], state)
        for file in (*newest.glob("rounds/*.json"), *newest.glob("rounds/*.safetensors")):
            found[f"{name} {file.name}"] = file.read_bytes()
        found |= {f"{name} {file.name}": "unfinished" for file in newest.rglob("*.part")}
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


def _kills(counts: Mapping[str, Counter[str]]) -> int:
    return sum(count["in a write"] + count["at a time"] for count in counts.values())


def campaign(kills: int, seed: int, names: Sequence[str], folder: Path, temporary: Path) -> int:
    """Kill and continue runs of each kind in turn, print a table, and return the number of failures."""
    numbers = random.Random(seed)
    whole: dict[str, tuple[Run, dict[str, object]]] = {}
    counts: dict[str, Counter[str]] = {name: Counter() for name in names}
    failures: list[str] = []
    fit = folder / "fit"
    fit.mkdir(parents=True)
    assert run(RUNS["ReconOnly"], fit, temporary).outcome == _DONE, (fit / "log").read_text()

    def start(name: str, at: str) -> Path:
        own = folder / f"{name.replace(' --', '_')}_{at}"
        own.mkdir()
        if name == "export":
            shutil.copytree(next(fit.glob("runs/*/version_0")), own / "runs" / "fit")
        return own

    for name in names:
        own = start(name, "whole")
        reference = run(RUNS[name], own, temporary)
        assert reference.outcome == _DONE, (own / "log").read_text()
        whole[name] = reference, contents(own)
        print(f"{name}: {reference.calls} calls, {reference.seconds:.1f} s, {len(whole[name][1])} files", flush=True)
    chain = 0
    while _kills(counts) < kills:
        name = names[chain % len(names)]
        chain += 1
        reference, expected = whole[name]
        own, count = start(name, str(chain)), counts[name]
        ended: Run | None = None
        for _ in range(numbers.randint(1, 5)):
            in_write = numbers.random() < 0.5
            moment: dict[str, float] = (
                {"call": numbers.randint(1, reference.calls)}
                if in_write
                else {"after": numbers.uniform(0, reference.seconds)}
            )
            ended = run(RUNS[name], own, temporary, **moment)  # type: ignore[arg-type]
            if ended.outcome != _KILLED:
                break
            count["in a write" if in_write else "at a time"] += 1
            count["before a checkpoint"] += not any(own.rglob("last.ckpt"))
            require_whole(own)
        if ended is None or ended.outcome != _DONE:
            ended = run(RUNS[name], own, temporary)
        count["runs"] += 1
        problem = ended.outcome if ended.outcome != _DONE else difference(expected, contents(own))
        if problem is None:
            count["equal"] += 1
            print(f"{chain}: {name}, kills so far: {_kills(counts)}", flush=True)
            shutil.rmtree(own)
        else:
            failures.append(f"{own}: {problem}")
            print(f"FAILED {failures[-1]}", flush=True)
    columns = ("runs", "at a time", "in a write", "before a checkpoint", "equal")
    rows = [[name, *(str(count[column]) for column in columns)] for name, count in counts.items()]
    rows.append(["together", *(str(sum(count[column] for count in counts.values())) for column in columns)])
    print_table(f"SIGKILL, seed {seed}", ["command", *columns], rows)
    return len(failures)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="at least so many (default: 200)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS), help="default: all")
    parser.add_argument("--tmpdir", default="/dev/shm", help="where temporary files are (default: /dev/shm)")
    return parser.parse_args()


def _main(options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    RepresentationFigures._draw = lambda *_: None  # type: ignore[method-assign]  # a third of the time of a short fit
    folder = Path(tempfile.mkdtemp(prefix="nernlit_kill_"))
    temporary = Path(tempfile.mkdtemp(prefix="nernlit_kill_", dir=options.tmpdir))
    same = folder.stat().st_dev == temporary.stat().st_dev
    print(f"runs in {folder}; TMPDIR={temporary}, on {'the same' if same else 'another'} file system", flush=True)
    began = time.monotonic()
    failures = campaign(options.kills, options.seed, options.runs, folder, temporary)
    print(f"{time.monotonic() - began:.0f} s, failures: {failures}")
    shutil.rmtree(temporary)
    if failures:
        raise SystemExit(1)
    shutil.rmtree(folder)


if __name__ == "__main__":
    _main(_options())
