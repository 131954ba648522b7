"""Signals to commands in processes of their own: exit codes, messages, and what is left."""

import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from nernlit.storage.checkpoint import read_checkpoint
from tests.fakes import QUICK

LONG = [*QUICK, "--trainer.max_epochs=100000", "--trainer.check_val_every_n_epoch=100000"]
PATIENCE = 120  # seconds, on a machine that has other things to do


def _stopped(args: Sequence[str], signum: signal.Signals, when: str) -> tuple[int, str]:
    """Start a command, send the signal once a file of this pattern is there, and give its exit code and stderr."""
    process = subprocess.Popen([sys.executable, "-m", "nernlit", *args], stderr=subprocess.PIPE, text=True)
    began = time.monotonic()
    while not list(Path().rglob(when)):
        assert process.poll() is None
        assert time.monotonic() - began < PATIENCE
        time.sleep(0.05)
    process.send_signal(signum)
    _, errors = process.communicate(timeout=PATIENCE)
    return process.returncode, errors


def _handles(process: subprocess.Popen[str], signum: signal.Signals) -> bool:
    """Whether the process has a handler for the signal; where that cannot be read, true after two seconds."""
    status = Path(f"/proc/{process.pid}/status")
    if not status.exists():
        time.sleep(2)
        return True
    (caught,) = (line.split()[1] for line in status.read_text().splitlines() if line.startswith("SigCgt"))
    return bool(int(caught, 16) >> (signum - 1) & 1)


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_fit_ends_with_the_signals_code_and_one_line(signum: signal.Signals, code: int) -> None:
    returned, errors = _stopped(["fit", *LONG], signum, "last.ckpt")
    (last,) = Path("runs").rglob("last.ckpt")
    step = read_checkpoint(last)["global_step"]
    assert returned == code
    assert errors.splitlines()[-1] == f"nernlit: interrupted at step {step}; continue with --ckpt_path last"
    assert "Traceback" not in errors


def test_a_sweep_ends_as_a_whole() -> None:
    args = ["sweep", "--configs", LONG[1], "--hidden", "8", "--seeds", "0", "1", *LONG[2:4], *LONG[5:]]
    returned, errors = _stopped(args, signal.SIGTERM, "last.ckpt")
    assert returned == 143
    assert errors.splitlines()[-1] == (
        "nernlit: interrupted in digits_h96, hidden 8, seed 0; 0 of 2 fits are in runs/sweep/sweep.csv, "
        "and the same command continues with the others"
    )
    assert not list(Path("runs").rglob("*seed1*"))


def test_before_a_fit_begins_it_ends_at_once_and_leaves_nothing() -> None:
    process = subprocess.Popen([sys.executable, "-m", "nernlit", "fit", *LONG], stderr=subprocess.PIPE, text=True)
    began = time.monotonic()
    while not _handles(process, signal.SIGTERM):  # then come the imports
        assert time.monotonic() - began < PATIENCE
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 143
    assert errors.splitlines()[-1].startswith("nernlit: interrupted")
    assert "Traceback" not in errors
    assert not list(Path().rglob("version_*"))


def test_a_second_signal_ends_the_process_at_once() -> None:
    code = (
        "import time\nfrom nernlit.utilities.signals import SIGNALS\n"
        "SIGNALS.listen(ends_process=True)\nSIGNALS.hold()\n"
        "print('ready', flush=True)\nwhile True: time.sleep(0.1)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    time.sleep(1)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE) == 143
