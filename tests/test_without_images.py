"""`data: null`: fitting and evaluation without images."""

import json
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nernlit.cli.main import main, run
from nernlit.errors import DataError, UsageError
from tests.fakes import CONFIGS, QUICK, write_weights

NULL = [*QUICK, "--data", "null"]
FOLDER = Path("runs/digits_h96/version_0")


def test_recon_only_fits_and_is_evaluated_without_data(capsys: pytest.CaptureFixture[str]) -> None:
    fitted = run(["fit", *NULL])
    metrics = fitted.trainer.callback_metrics
    assert not [name for name in metrics if "acc" in name]
    assert fitted.trainer.global_step == 10  # of the configuration's --data.steps_per_epoch=5
    shown = capsys.readouterr().out
    assert "explained power" in shown
    assert "accuracy" not in shown
    with_images = run(["fit", *QUICK])
    for name in ("val/recon_rmse", "val/explained_power"):
        assert float(metrics[name]) == float(with_images.trainer.callback_metrics[name])
    for command in ("validate", "test"):
        measured = run([command, *NULL, f"--ckpt_path={FOLDER}"]).trainer.callback_metrics
        stage = "val" if command == "validate" else "test"
        assert float(measured[f"{stage}/recon_rmse"]) == pytest.approx(float(metrics["val/recon_rmse"]))
        assert not [name for name in measured if "acc" in name]


def test_the_best_checkpoint_without_data_has_the_smallest_error() -> None:
    run(["fit", *NULL, "--trainer.max_epochs=3", "--model.optimizer.lr=1.0", "--model.scheduler=null"])
    errors = {e.step: e.value for e in EventAccumulator(str(FOLDER)).Reload().Scalars("val/recon_rmse")}
    best = torch.load(FOLDER / "checkpoints" / "best.ckpt", weights_only=True)
    assert best["global_step"] == min(errors, key=lambda step: errors[step]) + 1


def test_null_may_stand_in_the_file_and_the_saved_configuration_runs() -> None:
    Path("mine.yaml").write_text(f"base: [{QUICK[1]}]\ndata: null\n", encoding="utf-8")
    run(["fit", "-c", "mine.yaml", *QUICK[2:]])
    assert run(["fit", "-c", str(FOLDER / "config.yaml"), "--trainer.max_epochs=1"]).trainer.global_step == 5


def test_analyses_of_weights_need_no_data_and_others_name_it(capsys: pytest.CaptureFixture[str]) -> None:
    run(["fit", *NULL])
    for kind in ("spectrum", "layers"):
        main(["analyze", kind, str(FOLDER)])
        assert json.loads((FOLDER / "analysis" / f"{kind}.json").read_text())
    with pytest.raises(SystemExit):
        main(["analyze", "interpolate", str(FOLDER)])
    assert "was fitted without images; name a dataset (--data CLASS and its options)" in capsys.readouterr().err
    main(["analyze", "interpolate", str(FOLDER), "--data=DigitsDataModule", "--points=3", "--images=50"])


def test_progressive_runs_without_data() -> None:
    fit = ["fit", "-c", str(CONFIGS / "digits_h128.yaml"), *QUICK[5:], "--data=null", "--data.steps_per_epoch=2"]
    fit += ["--model.rounds=2", "--model.trials=2", "--model.min_delta=null"]
    fitted = run([*fit, "--trainer.max_epochs=2", "--trainer.check_val_every_n_epoch=1"])
    folder = Path(fitted.trainer.log_dir or "")
    records = json.loads((folder / "rounds/rounds.json").read_text())
    assert [record["val_acc"] for record in records] == [None, None]
    rmse = float(fitted.trainer.callback_metrics["val/recon_rmse"])
    assert records[1]["recon_rmse"] == pytest.approx(rmse)
    continued = run(["validate", *fit[1:], f"--ckpt_path={folder / 'checkpoints/last.ckpt'}"])
    assert float(continued.trainer.callback_metrics["val/recon_rmse"]) == pytest.approx(rmse)


@pytest.mark.parametrize(
    ("config", "scheme"),
    [
        ("digits_h96_decoupled", "DecoupledDistill"),
        ("digits_h96_baseline", "BaselineJoint"),
        ("digits_original", "OriginalModule"),
    ],
)
def test_schemes_that_need_images_say_so(config: str, scheme: str) -> None:
    with pytest.raises(UsageError, match=rf"{scheme} needs images to fit, and there are none \(`data: null`\)"):
        run(["fit", "-c", str(CONFIGS / f"{config}.yaml"), *QUICK[5:], "--data=null"])


def test_an_attack_without_images_is_refused() -> None:
    run(["fit", *NULL])
    line = ["test", *NULL, "--trainer.callbacks=AdversarialAccuracy", "--ckpt_path=last"]
    with pytest.raises(UsageError, match="AdversarialAccuracy attacks test images, and there are none"):
        run(line)


def test_a_missing_dataset_stops_a_fit_and_no_prediction() -> None:
    write_weights("cifar_resnet20", Path("original.safetensors"))
    line = ["-c", str(CONFIGS / "cifar10_h120.yaml"), *QUICK[2:], "--model.representation.order=none"]
    line.append("--trainer.check_val_every_n_epoch=1")
    line.append("--model.representation.original.checkpoint=original.safetensors")
    with pytest.raises(DataError, match=r"To run without images and without accuracies, pass --data null\."):
        run(["fit", *line, "--data.root=nowhere"])
    run(["fit", *line, "--data=null"])
    run(["predict", *line, "--data.root=nowhere", "--ckpt_path=best"])
    assert len(list(Path("runs/cifar10_h120").rglob("reconstructed.safetensors"))) == 1
