"""Claims on folders: one process holds each, whatever happens at the same time, and a dead one is replaced."""

import json
import multiprocessing
import os
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from nernlit.cli import claims
from nernlit.cli.claims import claim, remove_claims

FORK = multiprocessing.get_context("fork")
FOLDER = Path("runs/a/version_1")
ROUNDS = 100


def _together(work: Callable[[], None], processes: int = 4) -> None:
    started = [FORK.Process(target=work) for _ in range(processes)]
    for process in started:
        process.start()
    for process in started:
        process.join()
        assert process.exitcode == 0


def _write(number: int, **different: object) -> Path:
    """The claim of a process that has ended."""
    ended = FORK.Process(target=int)
    ended.start()
    ended.join()
    file = FOLDER.with_name(f"claim.{FOLDER.name}.{number}")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"host": claims._host(), "pid": ended.pid, "started": 1.0, **different}))
    return file


def _gets_it() -> bool:
    with claim(FOLDER) as is_ours:
        return is_ours


@pytest.mark.parametrize("dead", [False, True], ids=["free", "dead"])
def test_of_processes_that_start_in_the_same_instant_one_gets_the_folder(dead: bool) -> None:
    together, answers = FORK.Barrier(4), FORK.Queue()
    if dead:
        _write(1)

    def work() -> None:
        together.wait()
        with claim(FOLDER) as is_ours:
            answers.put(is_ours)
            together.wait()

    _together(work)
    assert sorted(answers.get() for _ in range(4)) == [False, False, False, True]


def test_no_two_processes_are_ever_in_a_folder_while_holders_come_go_and_die(monkeypatch: pytest.MonkeyPatch) -> None:
    is_held, dead = claims._is_held, _write(1).read_text()

    def hesitating(file: Path) -> bool:
        """Time for other processes to act on what this one has just seen."""
        held = is_held(file)
        time.sleep(random.random() / 200)
        return held

    monkeypatch.setattr(claims, "_is_held", hesitating)
    Path("inside").mkdir()

    def work() -> None:
        random.seed(os.getpid())
        left = []
        for number in range(ROUNDS):
            holding = claim(FOLDER)
            if not holding.__enter__():
                continue
            os.close(os.open("inside/now", os.O_CREAT | os.O_EXCL))  # fails if another process is inside
            time.sleep(random.random() / 200)
            Path("inside/now").rename(f"inside/{os.getpid()}-{number}")
            if random.random() < 0.5:
                holding.__exit__(None, None, None)
            else:  # as if the process had been killed
                claims._claims(FOLDER)[-1].write_text(dead)
                left.append(holding)
        os._exit(0)

    _together(work)
    assert len(list(Path("inside").iterdir())) > ROUNDS / 2


def test_a_held_folder_is_refused_until_it_is_released() -> None:
    with claim(FOLDER) as is_ours:
        assert is_ours
        assert not _gets_it()
    assert _gets_it()
    assert not Path("runs").exists()  # the folders were made for the claim


def test_a_claim_is_taken_over_if_its_process_has_ended_or_another_one_has_its_number() -> None:
    _write(1)
    assert _gets_it()
    _write(1, pid=os.getpid())  # which started at another time
    assert _gets_it()
    _write(1, pid=os.getpid(), started=claims._started(os.getpid()))
    assert not _gets_it()
    _write(2)  # the highest number counts
    with claim(FOLDER) as is_ours:
        assert is_ours
        assert sorted(file.name for file in FOLDER.parent.iterdir()) == [f"claim.version_1.{n}" for n in (1, 2, 3)]
        remove_claims(FOLDER)
    assert not list(FOLDER.parent.iterdir())


@pytest.mark.parametrize(
    "content",
    [
        '{"host": "another", "pid": 1, "started": 1}',
        "",
        '{"host": "ano',
        "[]",
        '{"host": "HOST", "pid": -1, "started": 1}',
        '{"host": "HOST", "pid": "x", "started": 1}',
    ],
)
def test_a_claim_of_another_machine_or_a_damaged_one_holds_while_it_is_fresh(content: str) -> None:
    file = _write(1)
    file.write_text(content.replace("HOST", claims._host()))
    assert not _gets_it()
    old = time.time() - claims.STALE_SECONDS
    os.utime(file, (old + 30, old + 30))
    assert not _gets_it()
    os.utime(file, (old - 5, old - 5))
    assert _gets_it()


def test_a_holder_keeps_its_claim_fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "HEARTBEAT_SECONDS", 0.01)
    with claim(FOLDER):
        (file,) = FOLDER.parent.iterdir()
        os.utime(file, (1.0, 1.0))
        until = time.monotonic() + 10
        while file.stat().st_mtime == 1.0 and time.monotonic() < until:
            time.sleep(0.01)
        assert file.stat().st_mtime > 1.0
    assert not [thread for thread in threading.enumerate() if thread.name.endswith("(_beat)")]
