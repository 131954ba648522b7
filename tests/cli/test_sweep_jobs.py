"""`nernlit sweep --jobs N`: fits in child processes, side by side."""

import hashlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from nernlit.cli import sweep_jobs
from nernlit.cli.main import main
from nernlit.cli.sweep import main as sweep
from nernlit.cli.sweep_jobs import Job, environment, progress_lines
from nernlit.cli.sweep_plan import Fit, Sweep
from nernlit.cli.sweep_results import read_results
from nernlit.errors import NernlitError
from nernlit.storage.checkpoint import read_checkpoint
from nernlit.utilities.signals import SIGNALS, Interrupted
from tests.cli.test_sweep import measured
from tests.fakes import QUICK

LINE = ["--configs", QUICK[1], "--out", "swept"]
#: What a child process does before it behaves as its test says: it can finish its fit.
_BEGIN = """
import os, pathlib, signal, sys, time
folder, row, seed, name = pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4]
def finish():
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "test.json").write_text(row)
def note(text):
    with open("notes", "a") as file:
        file.write(text + "\\n")
"""

Children = Callable[[str], None]


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> Children:
    """Let child processes run a script instead of a fit."""

    def use(script: str) -> None:
        def command(sweep: Sweep, fit: Fit) -> list[str]:
            row = json.dumps({**sweep.key(fit), **measured()})
            return [sys.executable, "-c", _BEGIN + script, str(sweep.folder(fit)), row, str(fit.seed), fit.name]

        monkeypatch.setattr(sweep_jobs, "child_command", command)

    return use


def _seeds(out: str = "swept") -> list[str]:
    return sorted(str(row["seed"]) for row in read_results(Path(out)))


def test_so_many_fits_run_at_the_same_time_and_divide_the_threads(
    children: Children, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    children("""
note("begin")
print("threads", os.environ["OMP_NUM_THREADS"], os.environ["MKL_NUM_THREADS"])
while len(open("notes").readlines()) < 3 and seed < 3:  # until three run
    time.sleep(0.01)
time.sleep(0.3)
finish()
note("end")
""")
    sweep([*LINE, "--seeds", "0", "1", "2", "3", "4", "--jobs", "3"])
    assert _seeds() == ["0", "1", "2", "3", "4"]
    running = most = 0
    for note in Path("notes").read_text().split():
        running += 1 if note == "begin" else -1
        most = max(most, running)
    assert most == 3
    logs = list(Path("swept").rglob("log.version_*.txt"))
    assert [log.read_text() for log in logs] == ["threads 2 2\n"] * 5
    shown = capsys.readouterr().out
    for number in (1, 2, 3):
        assert f"fit {number} of 5: digits_h96, seed {number - 1}\n" in shown
    assert re.search(r"^fit 4 of 5, about \d+ seconds? left: digits_h96, seed 3$", shown, re.MULTILINE)
    assert len(re.findall(r"^finished after \d+ seconds?: digits_h96, seed \d$", shown, re.MULTILINE)) == 5
    assert "table: swept/sweep.csv" in shown


def test_failed_fits_are_reported_with_the_end_of_their_logs_and_the_others_go_on(
    children: Children, capsys: pytest.CaptureFixture[str]
) -> None:
    children("""
print("\\n".join(f"line {number} of {seed}" for number in range(20)))
if seed == 1:
    print(f"nernlit: error: {name}: it diverged", "a table", "nernlit: error: 1 of 1 fits failed", sep="\\n")
    sys.exit(2)
if seed == 2:
    os.kill(os.getpid(), signal.SIGKILL)
if seed != 3:  # which another process runs
    finish()
""")
    with pytest.raises(NernlitError, match=r"2 of 5 fits failed; swept/sweep\.csv holds the others; the same command"):
        sweep([*LINE, "--seeds", "0", "1", "2", "3", "4", "--jobs", "2"])
    assert _seeds() == ["0", "4"]
    shown, said = capsys.readouterr()
    assert "failed: digits_h96, seed 1: it diverged\n" in shown
    assert "failed: digits_h96, seed 2: its process ended with SIGKILL\n" in shown
    assert "1 of 5 fits are running in other processes: digits_h96, seed 3\n" in shown
    for seed, reason in ((1, "it diverged"), (2, "its process ended with SIGKILL")):
        log = Sweep(Path("swept"), "best", []).folder(Fit(QUICK[1], None, seed))
        lines = "".join(f"\n  line {number} of {seed}" for number in range(10, 20))
        heading = f"last lines of {log.with_name(f'log.{log.name}.txt')}:"
        assert f"nernlit: error: digits_h96, seed {seed}: {reason}\n{heading}{lines}\n" in said


def test_an_error_that_concerns_all_fits_ends_the_sweep_at_once(children: Children) -> None:
    children("""
if seed == 0:
    time.sleep(60)
print("nernlit: error: there is no option --modle")
sys.exit(2)
""")
    began = time.monotonic()
    with pytest.raises(NernlitError, match=r"^there is no option --modle$"):
        sweep([*LINE, "--seeds", "0", "1", "2", "--jobs", "2"])
    assert time.monotonic() - began < 30
    assert not list(Path("swept").rglob("*seed2*"))


def test_a_sweep_after_an_interrupted_one_runs(children: Children, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SIGNALS, "received", signal.SIGINT)
    children("finish()")
    sweep([*LINE, "--seeds", "0", "1", "--jobs", "2"])
    assert _seeds() == ["0", "1"]


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_reaches_every_child_once_and_waits_for_all(
    signum: signal.Signals, code: int, children: Children, listening: None
) -> None:
    children(f"""
received = []
signal.signal({int(signum)}, lambda signum, _: received.append(signum))
if seed == 0:
    finish()
else:
    note("ready")
    if seed == 2:
        while len(open("notes").readlines()) < 2:
            time.sleep(0.01)
        os.kill(os.getppid(), {int(signum)})
    while not received:
        time.sleep(0.01)
    time.sleep(0.5)  # it saves a checkpoint
    note(f"{{seed}} received {{len(received)}}")
    sys.exit({code})
""")
    with pytest.raises(Interrupted) as ended:
        sweep([*LINE, "--seeds", "0", "1", "2", "3", "--jobs", "2"])
    assert ended.value.code == code
    assert ended.value.message == (
        "interrupted; 1 of 4 fits are in swept/sweep.csv, and the same command continues with the others"
    )
    assert sorted(Path("notes").read_text().splitlines()) == ["1 received 1", "2 received 1", "ready", "ready"]


def test_the_progress_of_each_fit_is_one_line_of_the_terminal() -> None:
    Path("log").write_text(
        "old\nfit of before\nstep 1\nstep 500 of 6000, 0:00:12, accuracy 91.23%, 45 steps/s, 1:0:0 left\n"
    )
    running = [
        Job(Fit("cifar100_h680_teacher_progressive.yaml", 680, seed), seed, None, Path("log"), skipped, 0.0)  # type: ignore[arg-type]
        for seed, skipped in ((0, 4), (1, Path("log").stat().st_size))
    ]
    for width in (80, 60, 140):
        console = Console(file=io.StringIO(), width=width)
        console.print(progress_lines(running))
        first, second = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
        assert first.startswith("cifar100_h680_teacher_progressive, hidden 680, seed 0: step 50"[: width - 1])
        assert second.strip() == "cifar100_h680_teacher_progressive, hidden 680, seed 1: starting"[: width - 1] + (
            "…" if width == 60 else ""
        )


def test_child_processes_get_their_share_of_threads_and_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert environment(1, 3)["OMP_NUM_THREADS"] == environment(1, 3)["MKL_NUM_THREADS"] == "3"
    assert "CUDA_VISIBLE_DEVICES" not in environment(1, 3)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [environment(slot, 1)["CUDA_VISIBLE_DEVICES"] for slot in range(4)] == ["0", "1", "0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-8f2")
    assert [environment(slot, 1)["CUDA_VISIBLE_DEVICES"] for slot in range(2)] == ["3", "GPU-8f2"]


def _results(out: str) -> list[dict[str, Any]]:
    """What must be equal in two sweeps: everything but times, memory and places."""
    other = ("folder", "host", "fit_seconds", "steps_per_second", "peak_memory_mib")
    rows = sorted(read_results(Path(out)), key=lambda row: (row["config"], row["seed"]))
    for row in rows:
        state = read_checkpoint(Path(str(row["folder"])) / "checkpoints/last.ckpt")["state_dict"]
        weights = b"".join(value.numpy().tobytes() for value in state.values() if isinstance(value, torch.Tensor))
        row["weights"] = hashlib.sha256(weights).hexdigest()
    return [{name: value for name, value in row.items() if name not in other} for row in rows]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_fits_side_by_side_equal_fits_one_after_the_other(capsys: pytest.CaptureFixture[str]) -> None:
    Path("bad.yaml").write_text(f"base: [{Path(QUICK[1]).resolve()}]\nmodel: {{init_args: {{loss: mae}}}}\n")
    # A class that only --trust allows, and which does nothing.
    callback = ["--trainer.callbacks=tests.callbacks.test_interruption.StopSignal", "--trainer.callbacks.call=0"]
    callback.append("--trainer.callbacks.hook=on_train_start")
    line = ["sweep", "--configs", QUICK[1], "bad.yaml", "--seeds", "0", "1", *QUICK[2:], *callback, "--trust"]
    for jobs, out in (("1", "in_turn"), ("2", "side_by_side")):
        with pytest.raises(SystemExit):
            main([*line, "--jobs", jobs, "--out", out])
        said = capsys.readouterr().err
        assert "nernlit: error: bad, seed 0: " in said
        assert f"nernlit: error: 2 of 4 fits failed; {out}/sweep.csv holds the others" in said
    assert len(_results("in_turn")) == 2
    assert _results("in_turn") == _results("side_by_side")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
def test_a_sweep_whose_processes_are_stopped_ends_as_an_undisturbed_one(signum: signal.Signals) -> None:
    line = ["sweep", "--configs", QUICK[1], "--seeds", "0", "1", *QUICK[2:], "--trainer.max_epochs=60"]
    main([*line, "--out", "whole"])
    command = [sys.executable, "-m", "nernlit", *line, "--jobs", "2", "--out", "stopped"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while len(list(Path("stopped").rglob("last.ckpt"))) < 2:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signum)
    if signum == signal.SIGKILL:
        for claim in Path("stopped").rglob("claim.*"):
            os.kill(json.loads(claim.read_text())["pid"], signum)
    _, said = process.communicate()
    assert process.returncode == (143 if signum == signal.SIGTERM else -9), said
    subprocess.run(command, check=True)
    assert _results("whole") == _results("stopped")
