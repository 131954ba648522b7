"""Runs that are told to stop: what they leave, and that going on gives what an uninterrupted fit gives."""

import os
import signal
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nernlit.callbacks import BestCheckpoint, Interruption
from nernlit.cli.main import run
from nernlit.utilities.signals import Interrupted
from tests.fakes import CONFIGS, QUICK, quiet_trainer
from tests.training.test_decoupled_distill import QUICK_DECOUPLED
from tests.training.test_progressive import QUICK_PROGRESSIVE

SCHEMES = {
    "recon_only": [*QUICK, "--trainer.max_epochs=3"],
    "decoupled": QUICK_DECOUPLED,
    "progressive": QUICK_PROGRESSIVE,
    # One validation in each round, and an end after the first round without a gain.
    "progressive_once": [*QUICK_PROGRESSIVE, "--trainer.check_val_every_n_epoch=2", "--model.min_delta=-2.0"],
    "original": ["fit", "-c", str(CONFIGS / "digits_original.yaml"), QUICK[2], *QUICK[5:], "--trainer.max_epochs=3"][
        1:
    ],
}


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Sums differ in their last bits with the number of threads, which depends on what else runs."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class StopSignal(L.Callback):
    """Sends a signal to the own process in a hook's n-th call."""

    def __init__(self, hook: str, call: int, signum: int = 15) -> None:
        self.calls = 0

        def send(trainer: L.Trainer, *_: Any, **__: Any) -> None:
            if trainer.sanity_checking:
                return
            self.calls += 1
            if self.calls == call:
                os.kill(os.getpid(), signum)

        setattr(self, hook, send)


def stopping(hook: str, call: int, signum: int = signal.SIGTERM) -> list[str]:
    where = "--trainer.callbacks=tests.callbacks.test_interruption.StopSignal"
    options = {"hook": hook, "call": call, "signum": int(signum)}
    return [where, *(f"--trainer.callbacks.{name}={value}" for name, value in options.items())]


def _curves(folder: Path) -> dict[str, dict[int, float]]:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    tags = [tag for tag in events.Tags()["scalars"] if tag == "train/loss" or tag.startswith("val/")]
    return {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in tags}


#: In the middle of an epoch, in its last batch, inside a validation, and when its results are taken into account.
PLACES = [
    ("on_train_batch_start", 7),
    ("on_train_batch_end", 10),
    ("on_validation_batch_end", 1),
]
MORE_PLACES = [("on_validation_start", 2), ("on_validation_end", 2), ("on_train_epoch_end", 2)]
CASES: list[Any] = [("recon_only", *place) for place in PLACES]
CASES += [pytest.param("recon_only", *place, marks=pytest.mark.slow) for place in MORE_PLACES]
CASES += [("original", "on_train_batch_start", 25), ("decoupled", "on_train_batch_end", 3)]
CASES += [("progressive", "on_train_batch_start", 4)]
CASES += [pytest.param("progressive", "on_train_batch_start", 3, marks=pytest.mark.slow)]
CASES += [("progressive", "on_validation_batch_start", 2), ("progressive_once", "on_validation_batch_start", 1)]
CASES += [("progressive_once", "on_train_batch_end", 4), ("progressive_once", "on_validation_batch_start", 2)]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Runs a scheme's whole fit once, and gives its folder."""

    @cache
    def fitted(scheme: str) -> Path:
        folder = tmp_path_factory.mktemp(scheme)
        run(["fit", *SCHEMES[scheme], f"--trainer.logger.init_args.save_dir={folder}"])
        return next(folder.glob("*/version_0"))

    return fitted


@pytest.mark.parametrize(("scheme", "hook", "call"), CASES)
def test_a_fit_that_was_told_to_stop_goes_on_exactly(
    scheme: str, hook: str, call: int, uninterrupted: Callable[[str], Path]
) -> None:
    line = ["fit", *SCHEMES[scheme]]
    whole = uninterrupted(scheme)
    with pytest.raises(Interrupted) as ended:
        run([*line, *stopping(hook, call)])
    (folder,) = Path("runs").glob("*/version_*")
    step = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]
    assert ended.value.code == 143
    assert ended.value.message == f"interrupted at step {step}; continue with --ckpt_path last"
    assert step > 0
    run([*line, "--ckpt_path=last"])
    for name in ("last", "best"):
        ends = [torch.load(of / "checkpoints" / f"{name}.ckpt", weights_only=True) for of in (whole, folder)]
        assert ends[0]["global_step"] == ends[1]["global_step"]
        assert ends[0]["epoch"] == ends[1]["epoch"]
        for key, value in ends[0]["state_dict"].items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, ends[1]["state_dict"][key]), key
    assert sorted(file.name for file in (folder / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt"]
    # Every step and every validation once, with the values of the uninterrupted run.
    assert _curves(whole) == _curves(folder)


def test_the_step_that_was_running_is_the_last_one() -> None:
    with pytest.raises(Interrupted) as ended:
        run(["fit", *SCHEMES["recon_only"], *stopping("on_train_batch_start", 7, signal.SIGINT)])
    assert ended.value.code == 130
    assert ended.value.message == "interrupted at step 7; continue with --ckpt_path last"


def test_a_signal_in_the_last_epoch_lets_the_fit_end_and_says_so() -> None:
    with pytest.raises(Interrupted) as ended:
        run(["fit", *SCHEMES["recon_only"], *stopping("on_train_batch_end", 15)])
    last = "runs/digits_h96/version_0/checkpoints/last.ckpt"
    assert ended.value.message == f"interrupted after the last step, 15; the fit is complete ({last})"
    assert torch.load(next(Path("runs").rglob("last.ckpt")), weights_only=True)["global_step"] == 15


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_other_commands_end_at_once(command: str) -> None:
    run(["fit", *QUICK])
    hook = {"validate": "on_validation_batch_start", "test": "on_test_batch_start"}.get(
        command, "on_predict_batch_start"
    )
    with pytest.raises(Interrupted) as ended:
        run([command, *QUICK, "--ckpt_path=last", *stopping(hook, 1)])
    assert ended.value.code == 143
    assert ended.value.message == f"{command} was interrupted"


def test_after_a_run_the_signals_do_what_they_did_before() -> None:
    before = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    run(["fit", *QUICK])
    with pytest.raises(Interrupted):
        run(["fit", *QUICK, *stopping("on_train_batch_end", 3)])
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == before


@pytest.fixture
def slurm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A SLURM job of one process; the file that its `scontrol` writes its arguments to."""
    job = {"JOB_ID": "4321", "JOB_NAME": "fit", "NTASKS": "1", "NTASKS_PER_NODE": "1", "NODELIST": "localhost"}
    job |= {"PROCID": "0", "LOCALID": "0", "NODEID": "0", "JOB_NUM_NODES": "1"}
    for name, value in job.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    for name in ("MASTER_ADDR", "MASTER_PORT"):  # Lightning sets them
        monkeypatch.setenv(name, "1")
    asked = tmp_path / "asked"
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {asked}\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{scontrol.parent}{os.pathsep}{os.environ['PATH']}")
    return asked


def test_a_slurm_job_that_is_told_of_its_end_is_requeued_and_goes_on_exactly(
    slurm: Path, uninterrupted: Callable[[str], Path]
) -> None:
    line = ["fit", *SCHEMES["recon_only"]]
    whole = uninterrupted("recon_only")
    with pytest.raises(Interrupted) as ended:
        run([*line, "--ckpt_path=last", *stopping("on_train_batch_start", 7, signal.SIGUSR1)])
    assert ended.value.code == 128 + signal.SIGUSR1
    assert ended.value.message == "interrupted at step 7; continue with --ckpt_path last; job 4321 was requeued"
    assert slurm.read_text() == "requeue 4321\n"
    run([*line, "--ckpt_path=last"])
    (folder,) = Path("runs").glob("*/version_*")
    ends = [torch.load(of / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"] for of in (whole, folder)]
    for key, value in ends[0].items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, ends[1][key]), key
    assert slurm.read_text() == "requeue 4321\n"
    assert not list(Path().rglob("hpc_ckpt*"))


def test_a_slurm_job_that_cannot_be_requeued_says_why(slurm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "77")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    slurm.mkdir()  # the shell cannot write there
    with pytest.raises(Interrupted) as ended:
        run(["fit", *SCHEMES["recon_only"], *stopping("on_train_batch_start", 7, signal.SIGUSR1)])
    assert "; continue with --ckpt_path last; `scontrol requeue 77_3` failed: " in ended.value.message


def test_the_last_checkpoint_is_beside_the_callback_that_writes_it() -> None:
    callbacks = [
        BestCheckpoint(dirpath="elsewhere"),
        ModelCheckpoint(dirpath="runs/a/checkpoints", filename="last"),
    ]
    assert Interruption._file(quiet_trainer(callbacks=callbacks, enable_checkpointing=True)) == (
        Path("runs/a/checkpoints/last.ckpt").absolute()
    )
