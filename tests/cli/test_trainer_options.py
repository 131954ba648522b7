"""Ordinary options of Lightning's Trainer on the command line."""

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from nernlit.callbacks import BestCheckpoint
from nernlit.cli.main import run
from nernlit.errors import UsageError
from tests.cli.refused import refused
from tests.fakes import QUICK

CHECKPOINTS = Path("runs/digits_h96/version_0/checkpoints")


def _file(**options: Any) -> list[str]:
    Path("more.yaml").write_text(yaml.safe_dump(options))
    return ["-c", "more.yaml"]


def _step(path: Path) -> int:
    return int(torch.load(path, weights_only=True)["global_step"])


def test_the_best_checkpoint_of_an_error_is_the_smallest() -> None:
    fit = ["fit", *QUICK, "--trainer.check_val_every_n_epoch=1", "--trainer.max_epochs=3"]
    run([*fit, "--best_checkpoint.monitor=val/recon_rmse"])
    errors = torch.load(CHECKPOINTS / "last.ckpt", weights_only=True)["callbacks"]
    best = next(state for key, state in errors.items() if key.startswith("BestCheckpoint"))
    assert float(best["best_model_score"]) == pytest.approx(float(best["current_score"]), rel=1e-2)
    assert float(best["best_model_score"]) <= float(best["current_score"])
    modes = {"val/acc": "max", "val/explained_power": "max", "val/recon_rmse": "min", "train/loss": "min"}
    assert {monitor: BestCheckpoint(monitor=monitor).mode for monitor in modes} == modes
    with pytest.raises(UsageError, match=r"best_checkpoint\.monitor 'x': pass best_checkpoint\.mode as well"):
        BestCheckpoint(monitor="x")
    assert BestCheckpoint(monitor="x", mode="min").mode == "min"
    assert BestCheckpoint(monitor=None).monitor is None
    with pytest.raises(UsageError, match="every_n_train_steps of the best checkpoint: it is chosen after validations"):
        BestCheckpoint(every_n_train_steps=3)


def test_tables_of_a_csv_logger_are_kept() -> None:
    logger = ["--trainer.logger=CSVLogger", "--trainer.logger.save_dir=runs", "--trainer.logger.name=csv"]
    run(["fit", *QUICK, *logger])
    folder = Path("runs/csv/version_0")
    before = (folder / "metrics.csv").read_text()
    run(["test", *QUICK, *logger, "--ckpt_path=best"])
    run(["fit", *QUICK, *logger, "--ckpt_path=last", "--trainer.max_epochs=3"])
    assert (folder / "metrics_1.csv").read_text() == before
    with (folder / "metrics.csv").open() as file:
        assert {int(row["step"]) for row in csv.DictReader(file)} >= {10, 14}


@pytest.mark.parametrize(
    "options",
    [
        ["--trainer.logger=false"],
        ["--best_checkpoint.dirpath=keep"],
        ["--trainer.logger=CSVLogger", "--trainer.logger.save_dir=runs", "--trainer.logger.version=0"],
    ],
)
def test_checkpoints_of_an_earlier_fit_are_not_replaced(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    run(["fit", *QUICK, *options])
    assert "best.ckpt of an earlier fit would be replaced" in refused(capsys, "fit", *QUICK, *options)


def test_several_loggers_have_one_folder() -> None:
    names = ("lightning.pytorch.loggers.TensorBoardLogger", "lightning.pytorch.loggers.CSVLogger")
    loggers = [{"class_path": name, "init_args": {"save_dir": "runs", "name": "two"}} for name in names]
    options = _file(trainer={"logger": loggers})
    for _ in range(2):
        run(["fit", *QUICK, *options])
    run(["fit", *QUICK, *options, "--ckpt_path=last", "--trainer.max_epochs=3"])
    assert sorted(path.name for path in Path("runs/two").iterdir()) == ["version_0", "version_1"]
    assert (Path("runs/two/version_1/metrics_1.csv")).is_file()
    assert _step(Path("runs/two/version_1/checkpoints/last.ckpt")) == 15
    loggers = [{**each, "init_args": {**each["init_args"], "version": "mine"}} for each in loggers]  # type: ignore[dict-item]
    run(["fit", *QUICK, *_file(trainer={"logger": loggers})])
    assert Path("runs/two/mine/checkpoints/last.ckpt").is_file()


def test_callbacks_of_ones_own_stand_beside_those_of_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    timer = {"class_path": "Timer", "init_args": {"duration": "01:00:00:00", "interval": "step"}}
    plain = {"class_path": "ModelCheckpoint", "init_args": {"save_top_k": -1}}
    run(["fit", *QUICK, *_file(trainer={"callbacks": [timer, plain]})])
    assert sorted(path.name for path in CHECKPOINTS.iterdir()) == [
        "best.ckpt",
        "epoch=0-step=5.ckpt",
        "epoch=1-step=10.ckpt",
        "last.ckpt",
    ]
    stops = [
        {"class_path": "EarlyStopping", "init_args": {"monitor": "val/recon_rmse", "patience": number}}
        for number in (1, 2)
    ]
    message = refused(capsys, "fit", *QUICK, *_file(trainer={"callbacks": stops}))
    assert "--trainer.callbacks: two callbacks of one class with the same options" in message
    unknown = {"class_path": "EarlyStopping", "init_args": {"monitor": "val_acc"}}
    message = refused(capsys, "fit", *QUICK, *_file(trainer={"callbacks": [unknown]}))
    assert "Early stopping conditioned on metric `val_acc` which is not available" in message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--trainer.accumulate_grad_batches=0"], "--trainer.accumulate_grad_batches 0; expected at least 1"),
        (["--trainer.check_val_every_n_epoch=0"], "check_val_every_n_epoch 0; for no validation pass --trainer.limit"),
        (["--trainer.val_check_interval=0"], "val_check_interval 0; for no validation pass --trainer.limit_val"),
        (["--data=null", "--trainer.overfit_batches=2"], "--trainer.overfit_batches 2 is not supported"),
    ],
)
def test_options_that_cannot_be_honored_arerefused(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [each for each in QUICK if "steps_per_epoch" not in each] if "--data=null" in options else QUICK
    assert message in refused(capsys, "fit", *arguments, *options)


def test_sections_and_strategies_that_cannot_be_honored_arerefused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "best_checkpoint: null; leave the section out" in refused(
        capsys, "fit", *QUICK, *_file(best_checkpoint=None)
    )
    strategy = {"class_path": "lightning.pytorch.strategies.DDPStrategy", "init_args": {"start_method": "spawn"}}
    message = refused(capsys, "fit", *QUICK, *_file(trainer={"strategy": strategy}))
    assert "--trainer.strategy with start_method spawn is for notebooks" in message


@pytest.mark.parametrize(("command", "option"), [("validate", "limit_val_batches"), ("test", "limit_test_batches")])
def test_an_evaluation_of_nothing_isrefused(command: str, option: str, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(capsys, command, *QUICK, f"--trainer.{option}=0")
    assert f"--trainer.{option} 0: `{command}` would measure nothing; leave it out" in message


def test_a_fit_with_a_drawn_seed_is_resumed_by_the_same_command() -> None:
    fit = ["fit", *QUICK, "--seed_everything=false"]
    run(fit)
    cli = run([*fit, "--ckpt_path=last", "--trainer.max_epochs=3"])
    assert cli.trainer.global_step == 15


def test_the_learning_rate_of_a_step_of_several_batches_is_logged_once() -> None:
    logger = ["--trainer.logger=CSVLogger", "--trainer.logger.save_dir=runs", "--trainer.logger.name=csv"]
    run(["fit", *QUICK, *logger, "--trainer.accumulate_grad_batches=5"])
    with Path("runs/csv/version_0/metrics.csv").open() as file:
        steps = [row["step"] for row in csv.DictReader(file) if row["lr"]]
    assert steps == sorted(set(steps))
    assert len(steps) == 2
