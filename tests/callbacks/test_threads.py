import multiprocessing
import time
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nernlit.callbacks import CpuThreads
from nernlit.cli.main import run
from nernlit.errors import UsageError
from nernlit.utilities.cpu import OtherPrograms, free_cores_only, most_threads
from tests.fakes import QUICK


class Scripted:
    """Other programs whose use of a machine of eight cores is written down: a number of cores per reading."""

    allowed = tuple(range(8))

    def __init__(self, *cores: float) -> None:
        self._script, self._now = list(cores), 0.0

    def cores(self) -> float:
        return self._now

    def free_threads(self, most: int) -> int:
        self._now = self._script.pop(0) if len(self._script) > 1 else self._script[0]
        return max(1, min(most, round(8 - self._now)))


@pytest.fixture
def _eight_threads() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(8)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def _never_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows of a single step may be slow by chance where other programs do run."""
    monkeypatch.setattr("nernlit.callbacks.threads._SLOWDOWN", float("inf"))


class Recorder(L.Callback):
    def __init__(self) -> None:
        self.used: list[int] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.used.append(torch.get_num_threads())


class Clock:
    """A clock that only steps move: real ones take other times beside other programs."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock of `CpuThreads`."""
    clock = Clock()
    monkeypatch.setattr("nernlit.callbacks.threads.time", clock)
    return clock


class Line(L.LightningModule):
    """The smallest module that trains. A step takes a millisecond of the clock, and 50 from step `slow_from` on."""

    def __init__(self, slow_from: int = 1_000, clock: Clock | None = None) -> None:
        super().__init__()
        self.line, self.slow_from, self.clock = torch.nn.Linear(1, 1), slow_from, clock or Clock()

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        self.clock.now += 0.05 if batch_idx >= self.slow_from else 0.001
        return self.line(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def _fit(*callbacks: L.Callback, steps: int = 10, module: L.LightningModule | None = None, **options: Any) -> L.Trainer:
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[*callbacks],
    )
    trainer.fit(module or Line(), torch.utils.data.DataLoader(torch.ones(steps, 1)), **options)
    return trainer


@pytest.mark.usefixtures("_eight_threads", "_never_slow")
def test_threads_give_way_to_other_programs_at_once_and_come_back_after_a_while() -> None:
    recorder = Recorder()
    # At setup, and after each of ten steps.
    others = Scripted(0.0, 0.0, 3.0, 3.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    _fit(CpuThreads("auto", 0.0, others), recorder)  # type: ignore[arg-type]
    assert recorder.used == [8, 8, 5, 5, 5, 5, 5, 5, 8, 8]
    assert torch.get_num_threads() == 8


@pytest.mark.usefixtures("_eight_threads", "_never_slow")
def test_a_fixed_number_of_threads_stays() -> None:
    recorder = Recorder()
    _fit(CpuThreads(3, 0.0, Scripted(7.0)), recorder)  # type: ignore[arg-type]
    assert set(recorder.used) == {3}
    assert torch.get_num_threads() == 8


@pytest.mark.usefixtures("_eight_threads")
def test_a_resumed_fit_begins_with_the_number_of_its_checkpoint(tmp_path: Path) -> None:
    busy = CpuThreads("auto", 60.0, Scripted(5.0))  # type: ignore[arg-type]
    trainer = L.Trainer(
        accelerator="cpu", devices=1, max_steps=2, default_root_dir=tmp_path, logger=False, callbacks=[busy]
    )
    trainer.fit(Line(), torch.utils.data.DataLoader(torch.ones(2, 1)))
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    recorder = Recorder()
    quiet = CpuThreads("auto", 60.0, Scripted(0.0))  # type: ignore[arg-type]
    _fit(quiet, recorder, steps=4, ckpt_path=checkpoint)
    assert set(recorder.used) == {3}


@pytest.mark.usefixtures("_eight_threads")
def test_steps_that_become_ten_times_slower_beside_others_are_explained(clock: Clock) -> None:
    callback = CpuThreads(8, 0.02, Scripted(6.0))  # type: ignore[arg-type]
    callback._others.free_threads(8)
    with pytest.warns(
        UserWarning, match=r"Steps have become 50 times slower \(0.05 s each\): other programs use 6.0 of 8 cores"
    ):
        _fit(callback, steps=300, module=Line(290, clock))


@pytest.mark.usefixtures("_eight_threads")
def test_slow_steps_on_a_quiet_machine_are_not_blamed_on_others(recwarn: pytest.WarningsRecorder, clock: Clock) -> None:
    _fit(CpuThreads(8, 0.02, Scripted(0.0)), steps=300, module=Line(290, clock))  # type: ignore[arg-type]
    assert not [warning for warning in recwarn if "times slower" in str(warning.message)]


class Phases(Line):
    """From `slow_from` on its steps have another loss term, and take longer."""

    term_names: tuple[str, ...] = ("recon",)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        self.term_names = ("kd",) if batch_idx >= self.slow_from else ("recon",)
        return super().training_step(batch, batch_idx)


@pytest.mark.usefixtures("_eight_threads")
def test_steps_of_another_phase_are_not_compared_with_those_before(
    recwarn: pytest.WarningsRecorder, clock: Clock
) -> None:
    # A window ends with each slow step: one that began in the phase before must not count.
    _fit(CpuThreads(8, 0.02, Scripted(6.0)), steps=300, module=Phases(290, clock))  # type: ignore[arg-type]
    assert not [warning for warning in recwarn if "times slower" in str(warning.message)]


def test_the_command_line_fixes_and_logs_the_number_of_threads() -> None:
    before = torch.get_num_threads()
    run(["fit", *QUICK, "--threads=1"])
    folder = Path("runs/digits_h96/version_0")
    events = EventAccumulator(str(folder)).Reload()
    assert [event.value for event in events.Scalars("threads")] == [1.0]
    assert yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))["threads"] == 1
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("threads", [0, -1])
def test_no_threads_are_refused(threads: int) -> None:
    with pytest.raises(UsageError, match=f"threads={threads}; expected at least 1, or auto"):
        CpuThreads(threads)


def _spin(seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


def test_the_cores_that_others_use_are_measured_without_ones_own() -> None:
    others = OtherPrograms()
    spinning = multiprocessing.get_context("fork").Process(target=_spin, args=(1.5,))
    spinning.start()
    while spinning.is_alive() and others._last.at + 1.2 > time.monotonic():
        time.sleep(0.05)
    busy = others.cores()
    spinning.join()
    assert busy > 0.2  # a core of its own on a quiet machine; less where many share it
    assert busy <= len(others.allowed)
    assert others.free_threads(1) == 1


@pytest.mark.usefixtures("_eight_threads")
def test_threads_come_back_after_an_error() -> None:
    class Failing(Line):
        def training_step(self, *_: Any) -> torch.Tensor:
            raise ConnectionAbortedError

    with pytest.raises(ConnectionAbortedError):
        _fit(CpuThreads("auto", 60.0, Scripted(5.0)), module=Failing())  # type: ignore[arg-type]
    assert torch.get_num_threads() == 8


@pytest.mark.usefixtures("_eight_threads", "_never_slow")
def test_a_fit_of_a_command_that_began_beside_other_programs_may_use_all_threads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("nernlit.utilities.cpu.other_programs", Scripted(6.0))
    recorder, quiet = Recorder(), Scripted(*[0.0] * 11)
    with free_cores_only():
        assert torch.get_num_threads() == 2
        _fit(CpuThreads("auto", 0.0, quiet), recorder)  # type: ignore[arg-type]
        assert torch.get_num_threads() == 2
    assert recorder.used == [8] * 10
    assert torch.get_num_threads() == 8
    assert most_threads() == 8
