"""`--ckpt_path` with files that are damaged, something else, or of another scheme."""

import os
from pathlib import Path
from typing import Literal

import pytest
import torch

from nernlit.callbacks import DurableCheckpointIO
from nernlit.cli.main import run
from nernlit.cli.resume import find_checkpoint
from nernlit.cli.runs import Run
from nernlit.storage.files import write_atomically
from tests.cli.refused import refused
from tests.fakes import CONFIGS, QUICK

CHECKPOINTS = Path("runs/digits_h96/version_0/checkpoints")


def _cut(path: Path, kept: int) -> None:
    write_atomically(path, path.read_bytes()[:kept])


@pytest.mark.parametrize("kept", [0, 20_000])
def test_a_damaged_last_checkpoint_is_replaced_by_the_newest_whole_one_aloud(
    kept: int, capsys: pytest.CaptureFixture[str]
) -> None:
    run(["fit", *QUICK])
    _cut(CHECKPOINTS / "last.ckpt", kept)
    os.utime(CHECKPOINTS / "best.ckpt", (1, 1))
    capsys.readouterr()
    cli = run(["fit", *QUICK, "--ckpt_path=last", "--trainer.max_epochs=3"])
    said = capsys.readouterr().err
    assert f"nernlit: warning: {CHECKPOINTS}/last.ckpt is " in said
    assert f"nernlit: continuing with {CHECKPOINTS}/best.ckpt (step " in said
    assert cli.trainer.global_step == 15
    assert torch.load(CHECKPOINTS / "last.ckpt", weights_only=True)["global_step"] == 15


def test_without_a_whole_checkpoint_there_is_nothing_to_go_on_with(capsys: pytest.CaptureFixture[str]) -> None:
    run(["fit", *QUICK])
    for path in CHECKPOINTS.iterdir():
        _cut(path, 0)
    message = refused(capsys, "fit", *QUICK, "--ckpt_path=last")
    assert f"nernlit: error: {CHECKPOINTS}/last.ckpt is an empty file (0 bytes)." in message
    assert f"All other checkpoints in {CHECKPOINTS} are damaged too." in message
    # An accuracy of another checkpoint than the one that was asked for would be a wrong number.
    message = refused(capsys, "test", *QUICK, "--ckpt_path=best")
    assert f"nernlit: error: {CHECKPOINTS}/best.ckpt is an empty file (0 bytes). Pass a .ckpt" in message


def test_files_that_are_no_checkpoints_are_said_to_be_what_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"conv.weight": torch.ones(2)}, "weights.pth")
    message = refused(capsys, "test", *QUICK, "--ckpt_path=weights.pth")
    assert "weights.pth is a PyTorch file of weights alone (tensors: 1). Pass a .ckpt that a fit wrote" in message
    Path("page.ckpt").write_text("<!DOCTYPE html><html></html>")
    message = refused(capsys, "fit", *QUICK, "--ckpt_path=page.ckpt")
    assert "page.ckpt is an HTML page, as a server sends it in place of a file; download the file itself." in message
    message = refused(capsys, "fit", *QUICK, "--ckpt_path=runs")
    assert "--ckpt_path runs: no such file" in message


def test_a_checkpoint_of_another_scheme_is_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    run(["fit", *QUICK])
    decoupled = ["-c", str(CONFIGS / "digits_h96_decoupled.yaml"), "--trainer.accelerator=cpu"]
    for command in ("fit", "test"):
        message = refused(capsys, command, *decoupled, f"--ckpt_path={CHECKPOINTS}/last.ckpt")
        assert "last.ckpt is a checkpoint of ReconOnly, and the configuration describes DecoupledDistill;" in message
        assert f"(--model.init_from {CHECKPOINTS}/last.ckpt)" in message


def test_a_fit_cannot_go_on_from_weights_alone(capsys: pytest.CaptureFixture[str]) -> None:
    run(["fit", *QUICK])
    content = torch.load(CHECKPOINTS / "last.ckpt", weights_only=True)
    for key in ("optimizer_states", "lr_schedulers", "loops"):
        del content[key]
    torch.save(content, "weights_only.ckpt")
    message = refused(capsys, "fit", *QUICK, "--ckpt_path=weights_only.ckpt")
    assert "weights_only.ckpt has no optimizer state, so a fit cannot be resumed from it" in message
    run(["test", *QUICK, "--ckpt_path=weights_only.ckpt"])


@pytest.mark.parametrize("given", ["last", "best"])
def test_the_newest_run_is_told_by_its_number_and_not_by_the_clock(given: Literal["last", "best"]) -> None:
    files = [Path(f"runs/name/version_{number}/checkpoints/{given}.ckpt") for number in (2, 9, 10)]
    for age, file in enumerate(files):  # the clock was set back before each run
        DurableCheckpointIO().save_checkpoint({"state_dict": {}, "global_step": 1}, file)
        os.utime(file, (1000 - age, 1000 - age))
    logger = {"init_args": {"save_dir": "runs", "name": "name"}}
    assert find_checkpoint({"ckpt_path": given, "trainer": {"logger": logger}}, "fit") == files[-1]
    assert logger["init_args"]["version"] == "version_10"
    assert Run.open("runs/name", given).checkpoint == files[-1]
    assert Run.open("runs/name/version_2", given).checkpoint == files[0]


def test_a_fit_goes_on_with_its_dataset_only(capsys: pytest.CaptureFixture[str]) -> None:
    run(["fit", *QUICK])
    for data in ("null", "NoImages"):
        message = refused(capsys, "fit", *QUICK, f"--data={data}", "--data.steps_per_epoch=5", "--ckpt_path=last")
        assert "the fit was started with DigitsDataModule, and this is NoImages, whose accuracies" in message
    run(["test", *QUICK, "--data=NoImages", "--ckpt_path=last"])  # an evaluation may use others


def test_a_version_that_is_named_is_the_one_that_is_used(capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        run(["fit", *QUICK])
    cli = run(["test", *QUICK, "--ckpt_path=best", "--trainer.logger.version=0"])
    assert "version_0" in str(cli.trainer.ckpt_path)
    message = refused(capsys, "test", *QUICK, "--ckpt_path=best", "--trainer.logger.version=7")
    assert "no best.ckpt in runs/digits_h96/version_7/checkpoints" in message
    message = refused(capsys, "fit", *QUICK, "--trainer.logger.version=1")
    assert "version_1/checkpoints/last.ckpt of an earlier fit would be replaced" in message
