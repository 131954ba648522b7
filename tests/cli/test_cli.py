import csv
import errno
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import timm
import torch
import yaml
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import nernlit
from nernlit.cli.main import main, report_failed_thread, run
from nernlit.cli.sweep import main as sweep
from nernlit.errors import UsageError
from tests.fakes import CONFIGS, QUICK, tiny_representation
from tests.training.test_decoupled_distill import QUICK_DECOUPLED

DECOUPLED = [QUICK[0], str(CONFIGS / "digits_h96_decoupled.yaml")]
ROOT = CONFIGS.parent


def _refused(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """The message of a command that must end with exit code 2 and no traceback."""
    with pytest.raises(SystemExit) as caught:
        main(args)
    assert caught.value.code == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return re.sub(r"^.* \.\.\.\n", "", message, flags=re.MULTILINE)  # the progress of what is slow on a busy machine


def test_fit_validate_test_and_predict_follow_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    fitted = run(["fit", *QUICK])
    shown = capsys.readouterr().out
    assert "reconstructed accuracy" in shown
    assert "tensorboard --logdir runs/digits_h96/version_0" in shown
    validated = run(["validate", *QUICK, "--ckpt_path=last"])
    assert float(validated.trainer.callback_metrics["val/acc"]) == float(fitted.trainer.callback_metrics["val/acc"])
    run(["test", *QUICK, "--ckpt_path=runs/digits_h96/version_0/checkpoints/best.ckpt"])
    run(["predict", *QUICK, "--ckpt_path=last"])
    with pytest.raises(UsageError, match=r"--trainer\.limit_predict_batches 0: `predict` would write nothing"):
        run(["predict", *QUICK, "--ckpt_path=last", "--trainer.limit_predict_batches=0"])
    path = "runs/digits_h96/version_0/reconstructed.safetensors"
    net = timm.create_model("digits_resnet8", checkpoint_path=path).eval()
    images = torch.rand(4, 1, 8, 8)
    original = fitted.model.representation.original
    expected = fitted.model.eval()(images)
    assert torch.allclose(net((images - original.mean) / original.std), expected, atol=1e-5)


@pytest.mark.figures
def test_tensorboard_holds_scalars_figures_and_hyperparameters() -> None:
    run(["fit", *QUICK])
    folder = Path("runs/digits_h96/version_0")
    events = EventAccumulator(str(folder)).Reload()
    scalars = set(events.Tags()["scalars"])
    assert scalars >= {
        *(f"val/{name}" for name in ("acc", "acc_top5", "acc_original", "recon_rmse", "explained_power")),
        *(
            "train/loss",
            "train/recon",
            "train/explained_power",
            "size/cr_paper",
            "size/cr_file",
            "size/predictor_params",
        ),
    }
    assert set(events.Tags()["images"]) == {"layers/error", "kernels"}
    # TensorBoard's hparams tab reads these three; the metrics are the run's last ones.
    written = b"".join(path.read_bytes() for path in folder.rglob("events*"))
    assert b"_hparams_/session_start_info" in written
    assert b"representation.predictor.init_args.hidden" in written
    finals = {event.step: event.value for event in events.Scalars("val/explained_power")}
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


def test_without_a_logger_ones_own_config_yaml_stays() -> None:
    Path("config.yaml").write_text(f"base: [{QUICK[1]}]\n", encoding="utf-8")
    run(["fit", "-c", "config.yaml", *QUICK[2:], "--trainer.logger=false"])
    assert Path("config.yaml").read_text(encoding="utf-8") == f"base: [{QUICK[1]}]\n"


def test_a_saved_configuration_runs_again() -> None:
    run(["fit", *QUICK])
    cli = run(["fit", "-c", "runs/digits_h96/version_0/config.yaml"])
    assert cli.trainer.global_step == 10


def test_checkpoints_hold_primitives_only_and_bring_their_model_along() -> None:
    fitted = run(["fit", *QUICK])
    path = "runs/digits_h96/version_0/checkpoints/last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint["hyper_parameters"]["_class_path"] == "nernlit.ReconOnly"
    assert not [key for key in checkpoint["state_dict"] if ".original." in key]
    tested = run(["test", "-c", "runs/digits_h96/version_0/config.yaml", f"--ckpt_path={path}"])
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
    assert "--ckpt_path best: no best.ckpt in runs/digits_h96/version_*/checkpoints" in message


@pytest.mark.parametrize(
    ("args", "pattern"),
    [
        (["fit", "-c", "nowhere.yaml"], "no configuration file nowhere.yaml"),
        (["fit", *QUICK, "--model.loss=mae"], r"--model\.loss mae: expected one of mse, rmse"),
        (["fit", *QUICK, "--model.los=mse"], r"--model\.los: ReconOnly has no option 'los'; did you mean loss\?"),
        (
            ["fit", *QUICK, "--model.representation.predictor.hiden=8"],
            r"--model\.representation\.predictor\.hiden: MLP has no option 'hiden'; did you mean hidden\?",
        ),
        (
            ["fit", *QUICK, "--model.representation.original.foo=1"],
            r"--model\.representation\.original\.foo: Original has no option 'foo'; it has name, checkpoint, ",
        ),
        (
            ["fit", *QUICK, "--model.optimizer.lrr=1"],
            r"--model\.optimizer\.lrr: Muon has no option 'lrr'; did you mean lr",
        ),
        (["fit", *QUICK, "--model.optimizer.lr=fast"], r"--model\.optimizer\.lr fast: expected a number"),
        (
            ["fit", *QUICK, "--model.optimizer=torch.optim.Adm"],
            r"torch\.optim\.Adm: torch\.optim has no Adm; expected the path of a class",
        ),
        (
            ["fit", *QUICK, "--model.representation.predictor.kernel_size=[3,5,7]"],
            r"predictor\.kernel_size \[3, 5, 7\]: expected an integer or a list of two integers\.",
        ),
        (
            ["fit", *QUICK, "--model.representation.predictor.kernel_size=[1,9]"],
            r"kernel_size=\[1,9\] is smaller than layer 'conv1' \(3x3\); pass --model\.representation\.predictor\.k",
        ),
        (
            ["fit", *QUICK, "--trainer=null"],
            r"--trainer null: expected options of the trainer, such as --trainer\.max_ep",
        ),
        (
            ["fit", *QUICK, "-c", "digits_h96_decoupled"],
            r"different schemes: -c \S*digits_h96\.yaml has ReconOnly and -c \S*digits_h96_decoupled\.yaml has D",
        ),
        (
            ["fit", *DECOUPLED, "--data.steps_per_epoch=5"],
            r"--data\.steps_per_epoch 5 has no effect with --data\.train_on images, where an epoch is",
        ),
        (["fit", *QUICK, "--trainer.max_epochs=many"], r"--trainer\.max_epochs many: expected an integer"),
        (
            ["fit", *QUICK, "--trainer.max_epoch=1"],
            r"no option --trainer\.max_epoch; did you mean --trainer\.max_epochs",
        ),
        (
            ["fit", *QUICK, "--trainer.precision=17"],
            r"--trainer\.precision 17: expected one of 64, 32, 16, .*bf16-true",
        ),
        (
            ["fit", *QUICK, "--trainer.fast_dev=1"],
            r"no option --trainer\.fast_dev; did you mean --trainer\.fast_dev_run",
        ),
        (["fit", *QUICK, "--trainer.enable_checkpointing=false"], r"enable_checkpointing false: fits keep best\.ckpt"),
        (["test", *QUICK, "--trainer.barebones=true"], r"--trainer\.barebones true: runs print and log their results"),
        (["predict", *QUICK, "--writer.path=x.pt"], "--writer.path x.pt: expected a file name that ends in .safetens"),
        (["fit", *QUICK, "--writer.path=x.safetensors"], "--writer.path is for `predict`; leave it out of `fit`"),
        (
            ["fit", *QUICK, "--model.optimizer=nernlit.optimizers.ranger21.Ranger21", "--model.optimizer.lr=0.01"],
            r"Ranger21 schedules its learning rate itself; pass --model\.scheduler null",
        ),
        (["fit", *QUICK, "--figures.every_n_validations=-1"], "every_n_validations=-1; expected at least 0"),
        (["fit", *QUICK, "--nonsense=1"], "there is no option --nonsense; see --help"),
        (["fit", *QUICK, "--base=x.yaml"], "there is no option --base"),
        (
            ["fit", *QUICK, "--model=ReconOny"],
            "--model ReconOny: expected one of BaselineJoint, DecoupledDistill, OriginalModule, Progressive, ReconOnly "
            r"\(did you mean ReconOnly\?\), or the path of a class of your own \(module\.Class\)",
        ),
        (
            ["fit", *QUICK_DECOUPLED, "--model.reconstruction.step=5"],
            r"--model\.reconstruction\.step: ReconstructionPhase has no option 'step'; did you mean steps\?",
        ),
        (
            ["fit", *QUICK_DECOUPLED, "--model.reconstruction.optimizer.lr=-1"],
            r"--model\.reconstruction\.optimizer cannot be built: Invalid learning rate: -1",
        ),
        (["fit", *QUICK, "--data=Digits"], "--data Digits: expected one of CIFAR100DataModule, .*DigitsDataModule"),
        (["fit", *QUICK, "--model.representation.predictor=MPL"], r"MPL: expected one of .*did you mean MLP\?"),
        (["fit", *QUICK, "--data.flip=maybe"], r"--data\.flip maybe: expected true or false"),
        (
            ["fit", *DECOUPLED, "--model.teacher=cifar_resnet56"],
            r"--model\.teacher cifar_resnet56: expected the options of Original: name, checkpoint, pretrained",
        ),
        (["fit", *DECOUPLED, "--model.teacher=[1]"], r"--model\.teacher \[1\]: expected the options of Original: name"),
        (["fit", *DECOUPLED, "--model.teacher={nme: x}"], r"--model\.teacher\.nme: Original has no option 'nme'"),
        (
            ["fit", *DECOUPLED, "--model.recon_steps=5"],
            r"DecoupledDistill has no option 'recon_steps'; did you mean reconstruction\.steps",
        ),
        (
            ["fit", *DECOUPLED, "--model.recon_optimizer.lr=5"],
            r"DecoupledDistill has no option 'recon_optimizer'; did you mean .*reconstruction\.optimizer",
        ),
        (["fit", *DECOUPLED, "--model.reconstruction=null"], r"--model\.reconstruction null: expected the options of"),
        (["fit", "--data.steps_per_epoch=5"], r"--data: name a class, one of .*DigitsDataModule.*, or pass a config"),
        (["fit", *QUICK, "--modle.x=5"], r"there is no option --modle\.x; did you mean --model\?"),
        (["fit", *QUICK, "--seed_everything=-1"], "--seed_everything -1: expected an integer from 0 to 4294967295"),
        (
            ["fit", *QUICK, "--seed_everything=4294967296"],
            "--seed_everything 4294967296: expected an integer from 0",
        ),
        (["fit", *QUICK, "--seed_everything=1.5"], r"--seed_everything 1\.5: expected true or false or an integer"),
        (
            ["fit", *QUICK, "--trainer.logger.init_args.save_dir=/dev/null"],
            r"save_dir /dev/null: null is a file; expected a folder",
        ),
        (
            ["fit", *QUICK, "--model=torch.nn.Linear"],
            r"--model torch\.nn\.Linear: expected one of .*from ClassifierModule",
        ),
        (
            ["fit", *QUICK, "--model.optimizer=torch.nn.Linear"],
            r"optimizer torch\.nn\.Linear: expected the path of a class",
        ),
        (
            ["fit", *QUICK, "--data=os.system"],
            r"--data: os\.system is refused, .* outside nernlit, torch, .*, and not in the working .*\. Pass --trust",
        ),
        (["fit", *QUICK, "--data=no_such_module.Data"], r"no_such_module cannot be imported \(ModuleNotFoundError: No"),
        (["fit", *QUICK, "--data.eval_sets=3"], r"--data\.eval_sets 3: expected one of CIFAR100C, CIFAR10C, Corrupted"),
        (["fit", *DECOUPLED, "--model.teacher={checkpoint: x}"], r"--model\.teacher\.name must be given"),
        (["fit", *DECOUPLED, "--model.teacher={name: x, name: y}"], "line 1: 'name' is given again"),
        (["fit", *QUICK, "--trainer.accelerator=abacus"], "--trainer: You selected an invalid accelerator name"),
        (["fit", *QUICK, "--trainer.strategy=chess"], "--trainer: You selected an invalid strategy name"),
        (
            ["fit", *QUICK, "--trainer.strategy=fsdp"],
            "--trainer.strategy fsdp splits parameters over devices, .* pass ddp",
        ),
        (
            ["fit", *QUICK, "--trainer.strategy=ddp_spawn"],
            "--trainer.strategy ddp_spawn is for notebooks and Python sessions; pass ddp, which",
        ),
        (["fit", *QUICK, "--trainer.strategy=deepspeed_stage_3"], "--trainer.strategy deepspeed_stage_3 splits parame"),
        (["fit", *QUICK, "--threads=0"], r"--threads 0: expected one of auto or a positive integer"),
        (
            [
                *("fit", *QUICK, "--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val/acc"),
                "--trainer.callbacks.patience=abc",
            ],
            "--trainer.callbacks.patience abc: expected an integer",
        ),
        (["fit", *QUICK, "more"], "'more' is not an option; options are given as --name value"),
        (["fit"], r"--data, --model must be given \(-c CONFIG; `nernlit configs` lists"),
        (["fit", *QUICK, "--data.val_share=2"], r"val_share=2\.0; expected a share"),
        (["fit", *QUICK, "--ckpt_path="], "--ckpt_path : no such file; pass a .ckpt, a run's folder"),
        (["fit", *QUICK, "--trainer.logger.init_args.name=a\0b"], "holds a NUL character; leave it out"),
        (["fit", *QUICK, "--ckpt_path=nowhere.ckpt"], "--ckpt_path nowhere.ckpt: no such file"),
        (["fit", *QUICK, "--model.representation.original.name=resnet"], "timm has no model named 'resnet'"),
        (
            ["fit", *QUICK, "--model.representation.original.pretrained=false"],
            "'digits_resnet8' has random weights; pass",
        ),
        (
            ["fit", "-c", str(CONFIGS / "cifar10_h180.yaml")],
            r"original\.checkpoint runs/cifar10_original: no such file or run; fit it once with "
            r"`lightning fit -c cifar10_original`, or pass the file of a checkpoint",
        ),
        (["nonsense"], r"unknown command 'nonsense'; the first argument is one of fit, validate, .*, report\."),
        (["tset"], r"unknown command 'tset' \(did you mean test\?\); the first argument is one of fit"),
        (["sweep", "--configs", QUICK[1], "--seed", "3"], "there is no option --seed; did you mean --seeds?"),
        (["fit", *QUICK, "--data.eval_sets={a.b: {class_path: x}}"], r"--data\.eval_sets \{.*\}: expected a list"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_mistakes_are_one_clear_message(args: list[str], pattern: str, capsys: pytest.CaptureFixture[str]) -> None:
    message = _refused(capsys, *args)
    assert re.search(pattern, message)
    assert message.startswith("nernlit: error: ")
    assert message.count("\n") == 1
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


def test_trust_allows_every_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "from nernlit.data import DigitsDataModule\n\n\nclass Mine(DigitsDataModule):\n    pass\n"
    (tmp_path / "installed_away.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    Path("mine.yaml").write_text(f"base: [{QUICK[1]}]\ndata: installed_away.Mine\n")
    for trust in ([], ["--trust"]):
        with pytest.raises(SystemExit) as caught:
            main(["fit", "-c", "mine.yaml", *QUICK[2:], "--print_config", *trust])
        assert caught.value.code == (0 if trust else 2)


def test_a_thread_that_cannot_write_prints_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(error: Exception) -> None:
        raise error

    monkeypatch.setattr(threading, "excepthook", report_failed_thread)
    for error in (OSError(errno.ENOSPC, "No space left on device"), KeyError("ours")):
        thread = threading.Thread(target=fail, args=[error])
        thread.start()
        thread.join()
        assert ("Traceback" in capsys.readouterr().err) == isinstance(error, KeyError)


def test_a_misspelled_section_of_a_file_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    Path("typo.yaml").write_text("trainr: {max_epochs: 3}\n", encoding="utf-8")
    message = _refused(capsys, "fit", *QUICK, "-c", "typo.yaml")
    assert message.startswith("nernlit: error: there is no option --trainr.max_epochs; did you mean --trainer.max_epo")


def test_a_name_that_the_locale_cannot_write_is_one_line() -> None:
    Path("name.yaml").write_text("trainer: {logger: {init_args: {name: é}}}\n", encoding="utf-8")
    done = _program("fit", *QUICK, "-c", "name.yaml", LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert done.returncode == 2
    assert re.search(
        r"nernlit: error: the file name '.+' cannot be encoded in this locale; set PYTHONUTF8=1", done.stderr
    )
    assert "Traceback" not in done.stderr


def test_print_config_prints_what_would_run(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["fit", *QUICK, "--print_config"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    printed = yaml.safe_load(text)
    assert printed["model"]["init_args"]["optimizer"]["class_path"] == "timm.optim.Muon"
    assert printed["data"]["init_args"]["steps_per_epoch"] == 5
    Path("printed.yaml").write_text(text, encoding="utf-8")
    same, first = run(["fit", "-c", "printed.yaml"]), run(["fit", *QUICK])
    metrics = [{name: float(value) for name, value in cli.trainer.callback_metrics.items()} for cli in (same, first)]
    assert metrics[0] == metrics[1]


@pytest.mark.parametrize(
    ("option", "names", "expected"),
    [
        ("--model.rate=null", ["rate"], None),
        ("--model.representation.quantize=null", ["representation", "quantize"], None),
        ("--model.representation.original.checkpoint=null", ["representation", "original", "checkpoint"], None),
        ("--model.representation.original.num_classes=null", ["representation", "original", "num_classes"], None),
        (
            "--model.representation.original.arguments={a: null, b: [null, 1], c: [2, null], d: NoneSuch}",
            ["representation", "original", "arguments"],
            {"a": None, "b": [None, 1], "c": [2, None], "d": "NoneSuch"},
        ),
    ],
)
def test_null_is_a_value_at_every_depth(
    option: str, names: list[str], expected: object, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["fit", "-c", "compress", option, "--print_config"])
    assert caught.value.code == 0
    value = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]
    for name in names:
        value = value[name]
    assert value == expected


def test_the_papers_schedule_is_printed_and_saved_as_what_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fit", *QUICK, "--schedule", "paper", "--print_config"])
    text = capsys.readouterr().out
    assert yaml.safe_load(text)["model"]["init_args"]["optimizer"]["class_path"] == "nernlit.optimizers.Ranger"
    assert not {"base", "schedule"} & set(yaml.safe_load(text))
    Path("printed.yaml").write_text(text, encoding="utf-8")
    assert run(["fit", "-c", "printed.yaml"]).trainer.global_step == 10


def test_a_configuration_that_names_code_runs_none(capsys: pytest.CaptureFixture[str]) -> None:
    Path("bad.yaml").write_text("model: !!python/object/apply:os.mkdir [run]\n", encoding="utf-8")
    assert "bad.yaml is not a valid configuration: could not determine" in _refused(capsys, "fit", "-c", "bad.yaml")
    assert not Path("run").exists()


def _program(*args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The console script: its folder, not the working directory, is where Python looks first."""
    script = "import sys; del sys.path[0]; from nernlit.__main__ import main; main()"
    return subprocess.run(
        [sys.executable, "-c", script, *args],
        capture_output=True,
        text=True,
        errors="replace",
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )


@pytest.mark.parametrize("line", [["fit", *QUICK, "--print_config"], ["inspect", "net.nern"]], ids=["print", "rich"])
def test_a_closed_pipe_ends_a_command_without_a_traceback(line: list[str]) -> None:
    tiny_representation().save("net.nern")
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "nernlit", *line]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, env=environment)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_the_version_is_printed() -> None:
    assert _program("--version").stdout == f"nernlit {nernlit.__version__}\n"


def test_ones_own_class_and_utf_8_work_in_any_locale() -> None:
    Path("mine.py").write_text(
        "from nernlit.data import DigitsDataModule\n\n\n"
        "class Ours(DigitsDataModule):\n"
        "    def __init__(self, label: str, **kwargs):\n"
        "        super().__init__(**kwargs)\n"
    )
    text = f"# été\nbase: [{QUICK[1]}]\ndata: {{class_path: mine.Ours, init_args: {{label: é}}}}\n"
    Path("mine.yaml").write_text(text, encoding="utf-8")
    line = ["-c", "mine.yaml", *QUICK[2:]]
    ascii_only = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    done = _program("fit", *line, **ascii_only)
    assert done.returncode == 0, done.stderr
    saved = Path("runs/digits_h96/version_0/config.yaml").read_text(encoding="utf-8")
    assert yaml.safe_load(saved)["data"]["init_args"]["label"] == "é"
    again = _program("test", "-c", "runs/digits_h96/version_0/config.yaml", "--ckpt_path", "best", **ascii_only)
    assert again.returncode == 0, again.stderr


def test_a_sweep_tabulates_and_goes_on_where_it_stopped(capsys: pytest.CaptureFixture[str]) -> None:
    line = ["sweep", "--configs", QUICK[1], "--hidden", "4", "8", "--out", "swept", *QUICK[2:4], *QUICK[5:]]
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
    line = ["sweep", "--configs", str(mine), "--hidden", "4", "--out", "swept", *QUICK[2:4], *QUICK[5:]]
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
    Path("swept/sweep.csv").write_text("config,seed\ndigits_h96,0\n")
    with pytest.raises(UsageError, match=r"sweep\.csv is not a table of this version of nernlit"):
        sweep(["--configs", QUICK[1], "--out", "swept"])
