import time

import pytest
from rich.console import Console

from nernlit.utilities.progress import progress


def test_work_that_is_done_soon_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("counting", 3) as advance:
        for _ in range(3):
            advance(1)
    assert capsys.readouterr() == ("", "")


def test_long_work_is_one_line_of_a_log(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("counting 3 things", 3, delay=0.01) as advance:
        for _ in range(3):
            time.sleep(0.02)
            advance(1)
    assert capsys.readouterr() == ("", "counting 3 things ...\n")


def test_long_work_is_a_bar_on_a_terminal_that_vanishes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nernlit.utilities.progress.CONSOLE", Console(stderr=True, force_terminal=True, width=80))
    with progress("counting", 2, delay=0.01) as advance:
        advance(1)
        time.sleep(0.2)
    shown = capsys.readouterr().err
    assert "counting" in shown
    assert "50%" in shown
    assert shown.endswith("\x1b[2K")  # the line is erased


def test_it_is_shown_before_the_first_unit_of_work_is_done(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("counting", 1, delay=0.01):
        time.sleep(0.1)
        assert capsys.readouterr().err == "counting ...\n"


def test_one_process_of_a_machine_shows_it(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    with progress("counting", 1, delay=0.01) as advance:
        advance(1)
        time.sleep(0.1)
    assert capsys.readouterr().err == ""
