import csv
import re
from pathlib import Path

import pytest
import timm
import torch
import yaml
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nernlit.cli import main, run
from nernlit.errors import UsageError
from nernlit.sweep import main as sweep
from tests.fakes import CONFIGS, QUICK


def _refused(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """The message of a command that must end with exit code 2 and no traceback."""
    with pytest.raises(SystemExit) as caught:
        main(args)
    assert caught.value.code == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return message


def test_fit_validate_test_and_predict_follow_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    fitted = run(["fit", *QUICK])
    shown = capsys.readouterr().out
    assert "reconstructed accuracy" in shown
    assert "tensorboard --logdir runs/digits_h64/version_0" in shown
    validated = run(["validate", *QUICK, "--ckpt_path=last"])
    assert float(validated.trainer.callback_metrics["val/acc"]) == float(fitted.trainer.callback_metrics["val/acc"])
    run(["test", *QUICK, "--ckpt_path=runs/digits_h64/version_0/checkpoints/best.ckpt"])
    run(["predict", *QUICK, "--ckpt_path=last"])
    path = "runs/digits_h64/version_0/reconstructed.safetensors"
    net = timm.create_model("digits_resnet8", checkpoint_path=path).eval()
    images = torch.rand(4, 1, 8, 8)
    original = fitted.model.representation.original
    expected = fitted.model.eval()(images)
    assert torch.allclose(net((images - original.mean) / original.std), expected, atol=1e-5)


def test_tensorboard_holds_scalars_figures_and_hyperparameters() -> None:
    run(["fit", *QUICK])
    folder = Path("runs/digits_h64/version_0")
    events = EventAccumulator(str(folder)).Reload()
    scalars = set(events.Tags()["scalars"])
    assert scalars >= {
        *(f"val/{name}" for name in ("acc", "acc_top5", "acc_original", "recon_rmse", "variance_explained")),
        *("train/loss", "train/recon", "train/variance_explained", "size/cr_paper", "size/predictor_params"),
    }
    assert set(events.Tags()["images"]) == {"layers/error", "kernels"}
    # TensorBoard's hparams tab reads these three; the metrics are the run's last ones.
    written = b"".join(path.read_bytes() for path in folder.rglob("events*"))
    assert b"_hparams_/session_start_info" in written
    assert b"representation.predictor.init_args.hidden" in written
    finals = {event.step: event.value for event in events.Scalars("val/variance_explained")}
    assert len(finals) == 2
    saved = yaml.safe_load((folder / "config.yaml").read_text())
    assert saved["model"]["init_args"]["representation"]["predictor"]["init_args"]["hidden"] == 8


def test_an_originals_checkpoint_serves_as_an_original() -> None:
    run(["fit", "-c", str(CONFIGS / "digits_original.yaml"), *QUICK[2:3], *QUICK[5:], "--data.batch_size=200"])
    checkpoint = "runs/digits_original/version_0/checkpoints/last.ckpt"
    original = "--model.representation.original"
    cli = run(["fit", *QUICK, f"{original}.pretrained=false", f"{original}.checkpoint={checkpoint}"])
    trained = torch.load(checkpoint, weights_only=True)["state_dict"]["original.net.conv1.weight"]
    assert torch.equal(cli.model.representation.original.net.conv1.weight, trained)


def test_a_saved_configuration_runs_again() -> None:
    run(["fit", *QUICK])
    cli = run(["fit", "-c", "runs/digits_h64/version_0/config.yaml"])
    assert cli.trainer.global_step == 10


def test_checkpoints_hold_primitives_only_and_bring_their_model_along() -> None:
    fitted = run(["fit", *QUICK])
    path = "runs/digits_h64/version_0/checkpoints/last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint["hyper_parameters"]["_class_path"] == "nernlit.modules.ReconOnly"
    assert not [key for key in checkpoint["state_dict"] if ".original." in key]
    # The width comes from the checkpoint, whatever the configuration says.
    other = [arg for arg in QUICK if "hidden" not in arg]
    tested = run(["test", *other, f"--ckpt_path={path}"])
    images = torch.rand(4, 1, 8, 8)
    assert torch.equal(tested.model.eval()(images), fitted.model.eval()(images))


def test_an_original_with_weights_is_evaluated_without_a_checkpoint() -> None:
    line = ["test", "-c", str(CONFIGS / "digits_original.yaml"), *QUICK[5:], "--model.original.pretrained=true"]
    assert float(run(line).trainer.callback_metrics["test/acc"]) > 0.95


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_random_weights_are_not_evaluated(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    message = _refused(capsys, command, *QUICK)
    assert f"`{command}` without --ckpt_path would use a network with random weights" in message
    message = _refused(capsys, command, *QUICK, "--ckpt_path=best")
    assert "--ckpt_path best: no best.ckpt in runs/digits_h64/version_*/checkpoints" in message


@pytest.mark.parametrize(
    ("args", "pattern"),
    [
        (["fit", "-c", "nowhere.yaml"], "no configuration file nowhere.yaml"),
        (["fit", *QUICK, "--model.loss=mae"], "loss.*mae"),
        (["fit", *QUICK, "--model.nonsense=1"], "nonsense"),
        (["fit", *QUICK, "--trainer.max_epochs=many"], "max_epochs.*many"),
        (["fit", *QUICK, "--nonsense=1"], "nonsense"),
        (["fit", *QUICK, "--model=Nonsense"], "Nonsense"),
        (["fit", *QUICK, "--data.val_share=2"], r"val_share=2\.0; expected a share"),
        (["fit", *QUICK, "--ckpt_path=nowhere.ckpt"], "--ckpt_path nowhere.ckpt: no such file"),
        (["fit", *QUICK, "--model.representation.original.name=resnet"], "timm has no model named 'resnet'"),
        (
            ["fit", *QUICK, "--model.representation.original.pretrained=false"],
            "'digits_resnet8' has random weights; pass",
        ),
        (["fit", "-c", str(CONFIGS / "cifar10_h180.yaml")], "has random weights; pass --model.representation.original"),
        (["nonsense"], "nonsense"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_mistakes_are_one_clear_message(args: list[str], pattern: str, capsys: pytest.CaptureFixture[str]) -> None:
    message = _refused(capsys, *args)
    assert re.search(pattern, message)
    assert message.startswith("nernlit: error: ")
    assert len(message) < 700


def test_nothing_is_left_behind_by_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    _refused(capsys, "fit", *QUICK, "--data.val_share=2")
    assert not Path("runs").exists()


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError):
        main(["fit", "-c", "nowhere.yaml", "--debug"])
    monkeypatch.setenv("NERNLIT_DEBUG", "1")
    with pytest.raises(UsageError):
        main(["fit", "-c", "nowhere.yaml"])


def test_print_config_prints_what_would_run(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["fit", *QUICK, "--print_config"])
    assert caught.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["model"]["init_args"]["optimizer"]["class_path"] == "timm.optim.Muon"
    assert printed["data"]["init_args"]["steps_per_epoch"] == 5


def test_a_sweep_tabulates_and_goes_on_where_it_stopped(capsys: pytest.CaptureFixture[str]) -> None:
    line = ["sweep", "--configs", QUICK[1], "--hidden", "4", "8", "--out", "swept", *QUICK[2:]]
    main([arg for arg in line if arg != "8"])
    first = Path("swept/sweep.csv").read_text()
    main(line)
    with Path("swept/sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["hidden"] for row in rows] == ["4", "8"]
    assert Path("swept/sweep.csv").read_text().startswith(first)
    assert all(0 <= float(row["acc"]) <= 1 and float(row["acc_original"]) > 0.9 for row in rows)
    for row in rows:
        answers = load_file(Path(row["folder"]) / "test_correct.safetensors")
        assert float(answers["reconstructed"].double().mean()) == pytest.approx(float(row["acc"]))
        assert float(answers["original"].double().mean()) == pytest.approx(float(row["acc_original"]))
        assert float(row["difference"]) == pytest.approx(float(row["acc"]) - float(row["acc_original"]))
    assert float(rows[0]["cr_paper"]) < float(rows[1]["cr_paper"])
    assert Path("swept/sweep.png").stat().st_size > 1000
    assert "table: swept/sweep.csv" in capsys.readouterr().out


def test_a_sweep_fits_anew_what_a_changed_file_describes() -> None:
    mine = Path("mine.yaml")
    mine.write_text(f"base: [{Path(QUICK[1]).resolve()}]\n")
    line = ["sweep", "--configs", str(mine), "--hidden", "4", "--out", "swept", *QUICK[2:]]
    main(line)
    mine.write_text(mine.read_text() + "model: {init_args: {loss: rmse}}\n")
    main(line)
    main(line)
    with Path("swept/sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2
    assert rows[0]["files"] != rows[1]["files"]


def test_a_sweep_refuses_several_processes_and_other_tables() -> None:
    with pytest.raises(UsageError, match=r"--trainer\.devices 2: a sweep's fits run on one device"):
        sweep(["--configs", QUICK[1], "--out", "swept", "--trainer.devices", "2"])
    assert not Path("swept").exists()
    Path("swept").mkdir()
    Path("swept/sweep.csv").write_text("config,seed\ndigits_h64,0\n")
    with pytest.raises(UsageError, match=r"sweep\.csv is no table of this version of nernlit"):
        sweep(["--configs", QUICK[1], "--out", "swept"])
