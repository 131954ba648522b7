"""What a fit shows: one line of a terminal's width, and lines of a log without one."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import pytest
import torch
from rich.cells import cell_len
from rich.console import Console

from nernlit.callbacks import ValidationLog
from nernlit.cli.main import run
from nernlit.data import DigitsDataModule
from nernlit.training import ReconOnly
from tests.fakes import CONFIGS, QUICK, quiet_trainer, tiny_representation

WITH_PROGRESS = [arg for arg in QUICK if "progress_bar" not in arg]


def _shown_in_a_terminal(columns: int, *args: str) -> str:
    """What a command writes to a terminal, control sequences included."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    environment |= {"TERM": "xterm-256color"}
    command = [sys.executable, "-m", "nernlit", *args]
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment) as process:
        os.close(theirs)
        shown = b""
        try:
            while part := os.read(ours, 65536):
                shown += part
        except OSError:  # how Linux says that the other end is closed
            pass
        assert process.wait() == 0, shown.decode()
    os.close(ours)
    return shown.decode()


@pytest.mark.parametrize("columns", [60, 80])
def test_a_fit_shows_one_line_in_a_terminal(columns: int) -> None:
    shown = _shown_in_a_terminal(columns, "fit", *WITH_PROGRESS, "--data.steps_per_epoch=40")
    assert "\x1b[1A" not in shown[shown.index("fit ") :]  # the cursor never goes up: there is one line to redraw
    frames = [re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", frame).rstrip() for frame in re.split(r"[\r\n]+", shown)]
    fit = [frame for frame in frames if frame.startswith("fit ") and "/s" in frame]
    assert fit
    assert all(cell_len(frame) <= columns for frame in frames if not frame.startswith("TensorBoard"))
    assert re.search(r"80/80  [\d.e+]+/s  0:00:00 left  acc \d+\.\d\d%", fit[-1])
    assert ("explained" in fit[-1]) == (columns == 80)
    for noise in ("FLOPs", "TPU", "not empty", "litlogger"):
        assert noise not in shown


def test_a_fit_without_a_terminal_prints_a_line_per_validation(capfd: pytest.CaptureFixture[str]) -> None:
    cli = run(["fit", *WITH_PROGRESS])
    lines = [line for line in capfd.readouterr().out.splitlines() if line.startswith("step ")]
    assert [line.split(",")[0] for line in lines] == ["step 5 of 10", "step 10 of 10"]
    metrics = cli.trainer.callback_metrics
    assert f", accuracy {metrics['val/acc']:.2%}, original {metrics['val/acc_original']:.2%}, " in lines[-1]
    assert f"explained power {metrics['val/explained_power']:.2%}, RMSE {metrics['val/recon_rmse']:.5f}" in lines[1]
    assert re.search(r"loss [\d.]+, [\d.]+ steps/s, 0:00:00 left$", lines[0])


def test_between_validations_there_is_a_line_per_minute(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    rest = [*WITH_PROGRESS, "--trainer.check_val_every_n_epoch=2"]
    monkeypatch.setattr("nernlit.callbacks.log_lines._SECONDS_BETWEEN_LINES", 0)
    run(["fit", *rest])
    lines = [line for line in capfd.readouterr().out.splitlines() if line.startswith("step ")]
    assert [line.split(",")[0] for line in lines] == [f"step {step} of 10" for step in [*range(1, 11), 10]]
    assert re.search(r"step 3 of 10, 0:00:\d\d, loss [\d.]+, [\d.]+ steps/s, 0:00:\d\d left$", lines[2])
    assert ["accuracy" in line for line in lines] == [False] * 10 + [True]


def test_a_progressive_fit_says_which_round_it_is(capfd: pytest.CaptureFixture[str]) -> None:
    config = [str(CONFIGS / "digits_h128.yaml") if "digits_h96" in arg else arg for arg in WITH_PROGRESS]
    run(["fit", *config, "--model.rounds=2", "--model.trials=2", "--trainer.check_val_every_n_epoch=1"])
    lines = [line for line in capfd.readouterr().out.splitlines() if line.startswith("step ")]
    assert [line.split(", ")[1] for line in lines] == ["round 1/2", "round 2/2"]


def test_the_progress_bar_can_be_switched_off(capfd: pytest.CaptureFixture[str]) -> None:
    run(["fit", *QUICK])
    assert "step 5" not in capfd.readouterr().out


@pytest.mark.parametrize("interactive", [False, True])
def test_a_progress_bar_of_ones_own_takes_the_place_of_ours(interactive: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(stderr=True, force_terminal=interactive, force_interactive=interactive)
    monkeypatch.setattr("nernlit.cli.trainer.CONSOLE", console)
    cli = run(["fit", *WITH_PROGRESS, "--trainer.callbacks+=TQDMProgressBar", "--trainer.limit_train_batches=1"])
    assert type(cli.trainer.progress_bar_callback).__name__ == "TQDMProgressBar"


def test_an_evaluation_without_a_terminal_says_how_far_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("nernlit.callbacks.log_lines.DELAY_SECONDS", 0)
    module = ReconOnly(tiny_representation(), optimizer=torch.optim.Adam)
    trainer = quiet_trainer(callbacks=[ValidationLog()])
    for command in (trainer.validate, trainer.test):
        command(module, DigitsDataModule(eval_batch_size=80), verbose=False)
    trainer = quiet_trainer(callbacks=[ValidationLog()], max_steps=1)
    trainer.fit(module, DigitsDataModule(eval_batch_size=80))
    lines = [line for line in capsys.readouterr().out.splitlines() if "batch" in line]
    assert len(lines) == 2  # the next ones a minute later
    for line, command_name, batches in zip(lines, ("validate", "test"), (2, 5), strict=True):
        assert re.fullmatch(rf"{command_name}: batch 1 of {batches}, 0:00:\d\d, 0:00:\d\d left", line)
