"""Run folders: claimed once, locked by a fit, and not left behind by a failed start."""

import fcntl
import multiprocessing
from pathlib import Path

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger

from nernlit.cli.main import main, run
from nernlit.cli.run_folders import claimed_folder
from nernlit.cli.runs import Run
from nernlit.errors import NernlitError, StorageError, UsageError
from nernlit.utilities.signals import Interrupted
from tests.fakes import QUICK

STOP = "--trainer.callbacks=tests.callbacks.test_interruption.StopSignal"


def _logger(version: str | None = None) -> TensorBoardLogger:
    return TensorBoardLogger("runs", "a", version)


def _claim(together: "multiprocessing.synchronize.Barrier", answers: "multiprocessing.Queue[str]") -> None:
    logger = _logger()
    assert logger.version == 0  # all have looked before one of them makes the folder
    together.wait()
    with claimed_folder([logger], numbered=True, fits=True):
        answers.put(logger.log_dir)
        together.wait()


def test_runs_that_start_in_the_same_instant_get_folders_of_their_own() -> None:
    processes = multiprocessing.get_context("fork")
    together, answers = processes.Barrier(4), processes.Queue()
    started = [processes.Process(target=_claim, args=(together, answers)) for _ in range(4)]
    for process in started:
        process.start()
    for process in started:
        process.join()
    assert sorted(answers.get() for _ in started) == [f"runs/a/version_{number}" for number in range(4)]


def test_a_second_fit_into_the_same_folder_is_refused() -> None:
    with claimed_folder([_logger("version_0")], numbered=False, fits=True):
        with (
            pytest.raises(UsageError, match="another fit is writing into runs/a/version_0; wait for it, or start"),
            claimed_folder([_logger("version_0")], numbered=False, fits=True),
        ):
            pass
        with claimed_folder([_logger("version_0")], numbered=False, fits=False):
            pass  # a test looks at what is there
    with claimed_folder([_logger("version_0")], numbered=False, fits=True):
        pass


def test_the_halves_of_files_that_a_killed_fit_left_are_removed() -> None:
    before_a_checkpoint, after_one = Path("runs/a/version_0"), Path("runs/a/version_1/checkpoints")
    for folder in (before_a_checkpoint, after_one):
        folder.mkdir(parents=True)
        (folder / ".config.yaml.123.part").write_bytes(b"half")
    running = Path("runs/a/version_0/.config.yaml.456.part")
    with running.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with claimed_folder([_logger("version_1")], numbered=False, fits=True):
            assert list(Path("runs").rglob("*.part")) == [running]


def test_a_file_where_the_folder_belongs_is_one_line() -> None:
    Path("runs").write_text("")
    with pytest.raises(StorageError, match="cannot make runs/a/version_0: "), claimed_folder([_logger()], True, True):
        pass


def test_a_fit_that_fails_before_its_first_checkpoint_leaves_no_folder(listening: None) -> None:
    with pytest.raises(NernlitError):
        run(["fit", *QUICK, "--data=nernlit.data.FolderDataModule", "--data.root=nowhere"])
    assert not list(Path("runs").rglob("version_*"))
    with pytest.raises(Interrupted) as ended:
        run(["fit", *QUICK, STOP, "--trainer.callbacks.hook=on_fit_start", "--trainer.callbacks.call=1"])
    assert ended.value.code == 143
    assert not list(Path("runs").rglob("version_*"))


def test_a_failure_never_takes_a_checkpoint_or_an_earlier_run_away(capsys: pytest.CaptureFixture[str]) -> None:
    run(["fit", *QUICK])
    last = Path("runs/digits_h96/version_0/checkpoints/last.ckpt")
    before = torch.load(last, weights_only=True)["global_step"]
    with pytest.raises(Interrupted):
        run(["fit", *QUICK, STOP, "--trainer.callbacks.hook=on_train_batch_end", "--trainer.callbacks.call=3"])
    assert Path("runs/digits_h96/version_1/checkpoints/last.ckpt").is_file()
    with pytest.raises(SystemExit):
        main(["fit", *QUICK, f"--ckpt_path={last}", "--trainer.max_epochs=0"])
    assert torch.load(last, weights_only=True)["global_step"] == before
    assert [folder.name for folder in sorted(Path("runs/digits_h96").iterdir())] == ["version_0", "version_1"]


def test_a_finished_fit_is_not_replaced() -> None:
    last = Path("runs/a/version_0/checkpoints/last.ckpt")
    last.parent.mkdir(parents=True)
    last.touch()
    with (
        pytest.raises(UsageError, match=r"version_0/checkpoints/last\.ckpt of an earlier fit would be replaced"),
        claimed_folder([_logger("version_0")], numbered=False, fits=True),
    ):
        pass
    assert last.is_file()
    with claimed_folder([_logger("version_0")], numbered=False, fits=True, resumes=True):
        pass


def test_runs_whose_names_are_no_numbers_are_not_ordered() -> None:
    for name in ("version_12345678", "version_3"):
        (Path("runs/a") / name / "checkpoints").mkdir(parents=True)
        (Path("runs/a") / name / "checkpoints" / "best.ckpt").touch()
    with pytest.raises(UsageError, match="do not say which is the newest; pass one of version_12345678, version_3"):
        Run.open("runs/a")
    assert Run.open("runs/a/version_3").folder == Path("runs/a/version_3")
