"""Options beside `--ckpt_path` are honored or refused by name."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from nernlit.cli.fitted_options import require_fitted_options
from nernlit.cli.main import main, run
from nernlit.errors import CheckpointError, UsageError
from tests.fakes import CONFIGS, QUICK, write_weights

LAST = "runs/digits_h96/version_0/checkpoints/last.ckpt"
DIGITS = CONFIGS.parent / "nernlit" / "originals" / "weights" / "digits_resnet8.safetensors"
ORIGINAL = "--model.representation.original"
DECOUPLED = ["-c", str(CONFIGS / "digits_h96_decoupled.yaml"), *QUICK[4:], "--data.batch_size=500"]
DECOUPLED += ["--model.reconstruction.steps=1", "--trainer.max_epochs=1", "--trainer.check_val_every_n_epoch=1"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model.optimizer.lr=0.5"], "--model.optimizer.lr is 0.5, and the checkpoint has 0.02"),
        (
            ["--model.optimizer=torch.optim.Adam"],
            "--model.optimizer.class_path is torch.optim.Adam, and the checkpoint has timm.optim.Muon",
        ),
        (
            ["--model.scheduler=null"],
            "--model.scheduler is null, and the checkpoint has nernlit.optimizers.WarmupCosine",
        ),
        (
            ["--model.loss=rmse", "--model.precision=fp32"],
            "--model.loss is rmse, and the checkpoint has mse; --model.pr",
        ),
        (["--model.representation.predictor.hidden=128"], "predictor.hidden is 128, and the checkpoint has 8"),
        (
            ['--model.representation.layers={"include": ["layer1.*"]}'],
            "--model.representation.layers.include is ['layer1.*'], and the checkpoint has all_convs",
        ),
        (["--schedule=paper"], "was fitted with other options: "),
    ],
)
def test_a_resumed_fit_refuses_what_the_checkpoint_was_not_fitted_with(options: list[str], message: str) -> None:
    run(["fit", *QUICK])
    with pytest.raises(UsageError, match=re.escape(message)) as caught:
        run(["fit", *QUICK, "--trainer.max_epochs=3", "--ckpt_path=last", *options])
    assert "or start a new fit" in str(caught.value)


def test_an_argument_of_the_network_that_the_checkpoint_does_not_have_is_refused() -> None:
    fitted, given = (
        {"representation": {"original": {"name": "vit", "arguments": arguments}}}
        for arguments in ({"depth": 3}, {"depth": 3, "mlp_ratio": 2.0})
    )
    require_fitted_options(Path("last.ckpt"), fitted, fitted, "test")
    message = r"--model\.representation\.original\.arguments\.mlp_ratio is 2\.0, and the checkpoint has null"
    with pytest.raises(UsageError, match=message):
        require_fitted_options(Path("last.ckpt"), fitted, given, "test")


def test_a_resumed_fit_takes_the_same_line_and_what_does_not_alter_the_module() -> None:
    run(["fit", *QUICK])
    same = ["--model.optimizer.lr=0.02", "--model.representation.predictor.hidden=8"]
    cli = run(["fit", *QUICK, *same, "--ckpt_path=last", "--trainer.max_epochs=3", "--data.eval_batch_size=100"])
    assert cli.trainer.global_step == 15
    saved = Path("runs/digits_h96/version_0/config.yaml").read_text(encoding="utf-8")
    assert yaml.safe_load(saved)["ckpt_path"] is None


def test_an_evaluation_refuses_another_representation_and_needs_no_optimizer() -> None:
    run(["fit", *QUICK])
    for command in ("validate", "test", "predict"):
        with pytest.raises(UsageError, match=r"predictor\.hidden is 128, and the checkpoint has 8") as caught:
            run([command, *QUICK, "--model.representation.predictor.hidden=128", f"--ckpt_path={LAST}"])
        assert "pass the checkpoint of such a fit" in str(caught.value)
    with pytest.raises(UsageError, match=r"order is cross_filter, and the checkpoint has in_filter"):
        run(["test", *QUICK, "--model.representation.order=cross_filter", f"--ckpt_path={LAST}"])
    run(["test", *QUICK, "--model.optimizer.lr=0.5", f"--ckpt_path={LAST}"])


def test_the_original_may_move_and_must_stay_the_same() -> None:
    shutil.copy(DIGITS, "original.safetensors")
    run(["fit", *QUICK, f"{ORIGINAL}.pretrained=false", f"{ORIGINAL}.checkpoint=original.safetensors"])
    Path("original.safetensors").rename("moved.safetensors")
    line = [*QUICK, f"{ORIGINAL}.pretrained=false"]
    with pytest.raises(
        CheckpointError,
        match=r"original\.safetensors, which does not exist any more; .*--model\.representation\.original\.checkpoint",
    ):
        run(["test", *line, f"{ORIGINAL}.checkpoint=original.safetensors", "--ckpt_path=best"])
    moved = f"{ORIGINAL}.checkpoint=moved.safetensors"
    tested = run(["test", *line, moved, "--ckpt_path=best"])
    assert float(tested.trainer.callback_metrics["test/acc_original"]) > 0.9
    run(["fit", *line, moved, "--trainer.max_epochs=3", "--ckpt_path=last"])
    assert torch.load(LAST)["hyper_parameters"]["representation"]["original"]["checkpoint"] == str(
        Path("moved.safetensors").absolute()
    )
    write_weights("digits_resnet8", Path("other.safetensors"))
    with pytest.raises(CheckpointError, match="another original"):
        run(["test", *line, f"{ORIGINAL}.checkpoint=other.safetensors", "--ckpt_path=best"])


def test_a_teacher_may_move_but_not_change() -> None:
    shutil.copy(DIGITS, "teacher.safetensors")
    teacher = {"name": "digits_resnet8", "checkpoint": "teacher.safetensors"}
    run(["fit", *DECOUPLED, f"--model.teacher={json.dumps(teacher)}"])
    Path("teacher.safetensors").rename("moved.safetensors")
    moved = {**teacher, "checkpoint": "moved.safetensors"}
    more = [*DECOUPLED, "--trainer.max_epochs=2", "--ckpt_path=last"]
    with pytest.raises(
        CheckpointError, match=r"which does not exist any more; pass its new path: --model\.teacher\.checkpoint FILE"
    ):
        run(["fit", *more, f"--model.teacher={json.dumps(teacher)}"])
    resumed = run(["fit", *more, f"--model.teacher={json.dumps(moved)}"])
    assert resumed.model.teacher.weights_from == str(Path("moved.safetensors").absolute())
    with pytest.raises(
        UsageError, match=r"--model\.teacher\.name is cifar_resnet20, and the checkpoint has digits_resnet8"
    ):
        run(["fit", *more, f"--model.teacher={json.dumps({**moved, 'name': 'cifar_resnet20'})}"])
    weights = load_file("moved.safetensors")
    save_file({key: value + (key == "linear.bias") for key, value in weights.items()}, "moved.safetensors")
    with pytest.raises(CheckpointError, match=r"the checkpoint's fit had a teacher of SHA-256 \w+\.\.\., this one has"):
        run(["fit", *DECOUPLED, "--trainer.max_epochs=3", "--ckpt_path=last", f"--model.teacher={json.dumps(moved)}"])
    Path("moved.safetensors").unlink()
    assert float(run(["test", *DECOUPLED, "--ckpt_path=best"]).trainer.callback_metrics["test/acc"]) >= 0


def test_a_fit_without_a_run_to_go_on_with_says_that_it_starts_anew(capsys: pytest.CaptureFixture[str]) -> None:
    cli = run(["fit", *QUICK, "--ckpt_path=last"])
    assert cli.trainer.global_step == 10
    said = capsys.readouterr().err
    assert "--ckpt_path last: no last.ckpt in runs/digits_h96/version_*/checkpoints yet; starting a new fit\n" in said


def test_a_runs_folder_is_a_checkpoint_and_works_from_anywhere(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(DIGITS, "original.safetensors")
    Path("runs").mkdir()
    run(["fit", *QUICK, f"{ORIGINAL}.pretrained=false", f"{ORIGINAL}.checkpoint=original.safetensors"])
    folder = Path("runs/digits_h96/version_0").absolute()
    saved = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    original = saved["model"]["init_args"]["representation"]["original"]
    assert original["checkpoint"] == str(Path("original.safetensors").absolute())
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    tested = run(["test", "-c", str(folder / "config.yaml"), f"--ckpt_path={folder}"])
    assert float(tested.trainer.callback_metrics["test/acc_original"]) > 0.9
    main(["analyze", "layers", str(folder)])
    assert (folder / "analysis" / "layers.json").is_file()
    (folder.parents[2] / "original.safetensors").rename("moved.safetensors")
    with pytest.raises(SystemExit):
        main(["analyze", "spectrum", str(folder)])
    assert (
        "original.safetensors, which does not exist any more. Pass its new path: --original FILE"
        in capsys.readouterr().err
    )
    main(["analyze", "spectrum", str(folder), "--original", "moved.safetensors"])
    assert (folder / "analysis" / "spectrum.json").is_file()


def test_a_configuration_takes_the_newest_run_of_its_original(capsys: pytest.CaptureFixture[str]) -> None:
    small = [*QUICK[5:], "--trainer.max_epochs=1"]
    for _ in range(2):
        run(["fit", "-c", str(CONFIGS / "digits_original.yaml"), *small, "--data.batch_size=500"])
    capsys.readouterr()
    line = [*QUICK, f"{ORIGINAL}.pretrained=false", f"{ORIGINAL}.checkpoint=runs/digits_original"]
    fitted = run(["fit", *line])
    newest = Path("runs/digits_original/version_1/checkpoints/best.ckpt").absolute()
    said = capsys.readouterr().err
    assert f"--model.representation.original.checkpoint {Path('runs/digits_original').absolute()}" in said.replace(
        "runs/digits_original:", f"{Path('runs/digits_original').absolute()}:"
    )
    assert fitted.model.representation.original.weights_from == str(newest)
    run(["fit", "-c", str(CONFIGS / "digits_original.yaml"), *small, "--data.batch_size=500"])
    tested = run(["test", *line, "--ckpt_path=best"])  # a newer run of the original is another network
    assert tested.model.representation.original.weights_from == str(newest)
