import csv
import json
import re
from pathlib import Path

import pytest
import timm
import torch
import yaml
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nernlit.cli import NernlitCLI, expand_bases, main, run
from nernlit.errors import UsageError
from tests.fakes import CONFIGS, QUICK, write_image_folder, write_stl10, write_weights

SHIPPED = sorted(CONFIGS.glob("*.yaml"))
#: What stands for the originals here: small ones, since a ResNet56 costs seconds a run.
ORIGINALS = {
    "cifar10": ("cifar_resnet20", 10),
    "cifar100": ("cifar_resnet20", 100),
    "stl10": ("cifar_resnet20", 10),
    "imagenet": ("test_resnet", 1000),
}


def _refused(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """The message of a command that must end with exit code 2 and no traceback."""
    with pytest.raises(SystemExit) as caught:
        main(args)
    assert caught.value.code == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return message


@pytest.fixture(scope="session")
def fakes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Where the fake data and weights of every dataset lie."""
    places = {}
    for dataset, (name, classes) in ORIGINALS.items():
        folder = places[dataset] = tmp_path_factory.mktemp(dataset)
        if dataset == "stl10":
            write_stl10(folder)
        else:
            write_image_folder(folder, classes, 2)
        write_weights(name, folder / "original.safetensors", num_classes=classes)
    return places


def _one_step(config: Path, fakes: dict[str, Path], *more: str) -> NernlitCLI:
    """A step of a shipped configuration (of each phase where there are two) on a tiny predictor and tiny fakes."""
    args = ["--trainer.max_steps=1", "--trainer.limit_val_batches=1", "--trainer.num_sanity_val_steps=0"]
    args += ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--data.val_share=0.5"]
    dataset, *words = config.stem.split("_")
    if dataset in ORIGINALS:
        args.append(f"--data.root={fakes[dataset]}")
        if "original" not in words:
            name, weights = ORIGINALS[dataset][0], fakes[dataset] / "original.safetensors"
            args.append(f"--model.representation.original.name={name}")
            args += ["--model.representation.original.pretrained=false", "--model.representation.order=none"]
            args.append(f"--model.representation.original.checkpoint={weights}")
    if "original" not in words:
        args.append("--model.representation.predictor.hidden=8")
    if words[-1] in ("original", "decoupled", "teacher", "noise", "baseline", "distill"):
        args.append("--data.batch_size=2")
    if words[-1] in ("decoupled", "teacher", "noise") and "baseline" not in words:
        args += ["--model.recon_steps=1", "--trainer.max_steps=2"]
    if words[-1] == "baseline" or "baseline" in words:
        args.append("--model.warmup_steps=0")
    if words[-1] == "teacher":
        # A small one: the shipped ResNet50 costs seconds.
        teacher: dict[str, object] = {"name": "cifar_resnet20", "num_classes": ORIGINALS[dataset][1]}
        args.append(
            f"--model.teacher={json.dumps({**teacher, 'checkpoint': str(fakes[dataset] / 'original.safetensors')})}"
        )
    if words[-1] in ("progressive", "distill"):
        args = [arg for arg in args if "representation" not in arg]
        first = config.stem.removesuffix("_progressive") if words[-1] == "progressive" else f"{dataset}_h140"
        first_run = _one_step(config.with_stem(first), fakes).trainer.log_dir
        args.append(f"--model.init_from={first_run}/checkpoints/last.ckpt")
    if dataset == "imagenet":
        args += ["--data.image_size=32", "--data.num_workers=0"]
    return run(["fit", "-c", str(config), *args, *more])


@pytest.mark.parametrize("config", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_configuration_runs_a_step(config: Path, fakes: dict[str, Path]) -> None:
    trainer = _one_step(config, fakes).trainer
    assert trainer.global_step == trainer.max_steps
    assert torch.isfinite(trainer.callback_metrics["train/loss"])


@pytest.mark.parametrize("scheme", ["h140", "h140_baseline", "h140_decoupled", "h140_teacher", "h140_noise", "h300"])
def test_the_papers_schedule_runs_a_step(scheme: str, fakes: dict[str, Path]) -> None:
    cli = _one_step(CONFIGS / f"cifar10_{scheme}.yaml", fakes, "--schedule=paper")
    assert type(cli.trainer.optimizers[0]).__name__ == "Ranger"
    assert cli.model.representation.scale == 1
    assert cli.config["fit"]["schedule"] == "paper"


def test_configurations_name_a_known_network_and_say_their_width() -> None:
    for config in SHIPPED:
        if match := re.search(r"_h(\d+)", config.stem):
            args = expand_bases(["-c", str(config)])
            contents = [yaml.safe_load(Path(path).read_text()) for path in args if path != "-c"]
            arguments = [content.get("model", {}).get("init_args", {}) for content in contents]
            trees = [tree.get("representation") or {} for tree in arguments]
            predictors = [tree.get("predictor", {}) for tree in trees]
            names = [tree.get("original", {}).get("name") for tree in trees]
            assert timm.is_model(next(name for name in reversed(names) if name)), config.name
            widths = [tree["init_args"]["hidden"] for tree in predictors if "hidden" in tree.get("init_args", {})]
            assert widths[-1] == int(match[1]), config.name


def test_a_schedule_that_nothing_has_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("trainer: {max_epochs: 1}\n")
    assert "none of the given configurations has one" in _refused(
        capsys, "fit", "-c", str(tmp_path / "mine.yaml"), "--schedule", "paper"
    )


def test_configurations_say_only_what_differs_from_their_bases() -> None:
    for config in SHIPPED:
        content = yaml.safe_load(config.read_text())
        assert content["base"], f"{config.name} has no base"
        assert content["trainer"]["logger"]["init_args"]["name"] == config.stem


def test_bases_come_before_the_file_that_names_them(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("base: [sub/b.yaml]\n")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.yaml").write_text("base: [c.yaml]\n")
    (tmp_path / "sub" / "c.yaml").write_text("seed_everything: 1\n")
    args = expand_bases(["fit", f"--config={tmp_path / 'a.yaml'}", "--x"])
    names = [Path(arg).name for arg in args]
    assert names == ["fit", "-c", "c.yaml", "-c", "b.yaml", "-c", "a.yaml", "--x"]
    (tmp_path / "sub" / "c.yaml").write_text("base: [b.yaml]\n")
    with pytest.raises(UsageError, match="builds on itself"):
        expand_bases(["fit", "-c", str(tmp_path / "a.yaml")])


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
