import re
import signal
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save, save_file

import nernlit
from nernlit.cli import compress
from nernlit.cli.main import main
from nernlit.cli.report import page
from nernlit.cli.runs import Run
from nernlit.storage.container import read_container
from nernlit.utilities.signals import Interrupted
from tests.callbacks.test_interruption import stopping
from tests.fakes import digits_representation, write_image_folder

DIGITS = ["--data", "DigitsDataModule", "--threads=1"]


def _refused(args: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as error:
        main(["compress", *args])
    assert error.value.code == 2
    return capsys.readouterr().err


def test_a_network_becomes_a_file_of_the_size_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["compress", "digits_resnet8", "-o", "small.nern", "--target_bytes=24000", "--epochs=8", *DIGITS]
    main(command)
    shown = capsys.readouterr().out
    size = Path("small.nern").stat().st_size
    assert size == pytest.approx(24_000, rel=0.03)
    original = len(save(timm.create_model("digits_resnet8").state_dict()))
    assert f"digits_resnet8 has {original:,} bytes as safetensors" in shown
    assert f"small.nern will have 24,000 bytes ({24_000 / original:.1%})" in shown
    figures = {line.split("  ")[0].strip(): line.split()[-1] for line in shown.splitlines() if line.strip()}
    share = f"{size / original:.1%}"
    assert figures["CR (.nern file / original's file)"] == share
    assert f"CR of the file {share}" in shown
    accuracy = float(next(line for line in shown.splitlines() if line.startswith("accuracy")).split()[-1].rstrip("%"))
    assert accuracy > 90
    assert nernlit.load("small.nern").original.class_names == tuple("0123456789")

    before = torch.load(next(Path("runs").rglob("last.ckpt")), weights_only=True)["global_step"]
    main(command)  # the fit is complete
    assert Path("small.nern").stat().st_size == size
    assert torch.load(next(Path("runs").rglob("last.ckpt")), weights_only=True)["global_step"] == before
    assert len(list(Path("runs").glob("small-*/version_*"))) == 1


def test_the_fit_of_a_file_is_exported_and_reported_as_the_file(capsys: pytest.CaptureFixture[str]) -> None:
    main(["compress", "digits_resnet8", "-o", "small.nern", "--bits=0.8", "--epochs=8", *DIGITS])
    shown = capsys.readouterr().out
    accuracy = next(line for line in shown.splitlines() if line.startswith("accuracy")).split()[-1].rstrip("%")
    (fit,) = Path("runs").glob("small-*")
    for options in ([], ["--select=last"], ["--kept=int8"], ["--fold_batch_norm"]):
        main(["export", str(fit), "-o", "again.nern", *options])
        assert Path("again.nern").read_bytes() == Path("small.nern").read_bytes()
    main(["export", str(fit), "-o", "exact.nern", "--kept=fp32", "--no-fold_batch_norm"])
    assert read_container(Path("exact.nern")).header["kept"]["form"] == "fp32"
    cells = re.findall(r"<td[^>]*>([^<]*)</td>", page([Run.open(fit)]))
    assert accuracy in cells
    assert f"{100 * Path('small.nern').stat().st_size / nernlit.load('small.nern').sizes().original_bytes:.2f}" in cells


def test_the_bits_are_those_of_the_weights_and_the_form_that_are_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model.rate.kept=fp32", '--model.representation.layers={"include": ["layer3.*"]}', "--epochs=8"]
    main(["compress", "digits_resnet8", "-o", "small.nern", "--bits=2", *options, *DIGITS])
    assert "2.00 bits for each of 55,296 weights" in capsys.readouterr().out
    main(["inspect", "small.nern"])
    found = re.search(r"integers: (\S+) bits for each of 55,296 predicted weights", capsys.readouterr().out)
    assert found is not None
    assert float(found[1]) == pytest.approx(2, rel=0.03)


def test_an_interrupted_command_continues(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["compress", "digits_resnet8", "-o", "small.nern", "--epochs=3", *DIGITS, "--data.batch_size=500"]
    cut = ["--trainer.callbacks=tests.fakes.PowerCut", "--trainer.callbacks.before_batch=5"]
    main([*command, "-o", "whole.nern"])
    with pytest.raises(ConnectionAbortedError):
        main([*command, *cut])
    assert not Path("small.nern").exists()
    (run,) = Path("runs").glob("small-*")
    options = "".join(run.name.rpartition("-")[0:2])
    whole = next(path for path in Path("runs").iterdir() if path.name.startswith("whole-"))
    run.rename(run.with_name(options + whole.name.rpartition("-")[2]))  # of the same options without the power cut
    main(command)
    assert Path("small.nern").read_bytes() == Path("whole.nern").read_bytes()


def test_a_stopped_command_says_how_to_go_on() -> None:
    stop = stopping("on_train_batch_start", 3, signal.SIGINT)
    with pytest.raises(Interrupted) as stopped:
        main(["compress", "digits_resnet8", "-o", "small.nern", "--epochs=3", *DIGITS, *stop])
    assert stopped.value.message == "interrupted; the same command continues it, and small.nern is written at its end"
    assert not Path("small.nern").exists()


def test_a_file_that_is_larger_than_planned_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compress, "_TOLERANCE", 1.0)
    main(["compress", "digits_resnet8", "-o", "s.nern", "--target_bytes=9000", "--epochs=1", *DIGITS])
    share = Path("s.nern").stat().st_size / 9000 - 1
    assert share > 0
    assert f"s.nern has {share:.1%} more bytes than planned: train longer (--epochs)" in capsys.readouterr().out


def test_a_file_of_weights_says_its_network_or_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    state = timm.create_model("digits_resnet8", pretrained=True).state_dict()
    save_file(state, "silent.safetensors")
    save_file(state, "speaking.safetensors", {"timm_name": "digits_resnet8"})
    quick = [*DIGITS, "--epochs=1", "--data.batch_size=500"]
    assert "silent.safetensors does not contain the name of its network; pass --network NAME" in _refused(
        ["silent.safetensors", "-o", "a.nern", *quick], capsys
    )
    main(["compress", "silent.safetensors", "--network", "digits_resnet8", "-o", "a.nern", *quick])
    main(["compress", "speaking.safetensors", "-o", "b.nern", *quick])
    torch.save(state, "weights.ckpt")
    main(["compress", "weights.ckpt", "--network", "digits_resnet8", "-o", "c.nern", *quick])
    assert Path("c.nern").stat().st_size == pytest.approx(Path("a.nern").stat().st_size, rel=0.01)
    assert Path("a.nern").stat().st_size == pytest.approx(Path("b.nern").stat().st_size, rel=0.01)


def test_the_run_that_trained_a_network_says_all_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    write_image_folder(Path("images"), 4, 12)
    data = ["--data=FolderDataModule", "--data.root=images", "--data.image_size=32", "--data.batch_size=8"]
    network = ["--model.original.name=mobilenetv3_small_050", "--model.original.num_classes=4"]
    quick = ["--trainer.max_epochs=1", "--trainer.enable_progress_bar=false", "--threads=1"]
    main(["fit", "-c", "digits_original", *network, "--model.original.mean=[0.4]", *data, *quick])
    main(["compress", "runs/digits_original", "-o", "small.nern", "--epochs=1", *data, "--threads=1"])
    best = "runs/digits_original/version_0/checkpoints/best.ckpt"
    assert f"nernlit: runs/digits_original: taking {best}" in capsys.readouterr().err
    loaded = nernlit.load("small.nern")
    assert (loaded.original.name, loaded.original.num_classes) == ("mobilenetv3_small_050", 4)
    assert float(loaded.original.mean[0]) == pytest.approx(0.4)
    message = _refused([best, "--network=resnet18", "-o", "a.nern", *data], capsys)
    assert "best.ckpt does not fit ResNet" in message

    main(["fit", "-c", "digits_h96", "--trainer.max_steps=1", *quick])
    message = _refused(["runs/digits_h96", "-o", "a.nern", *DIGITS], capsys)
    assert "best.ckpt is a checkpoint of a predictor, not of a network. Export it" in message


def test_options_of_the_original_describe_the_network(capsys: pytest.CaptureFixture[str]) -> None:
    write_image_folder(Path("images"), 4, 12)
    state = timm.create_model("mobilenetv3_small_050", num_classes=4).state_dict()
    save_file(state, "own.safetensors", {"timm_name": "mobilenetv3_small_050"})
    images = ["--data=FolderDataModule", "--data.root=images", "--data.batch_size=8", "--epochs=1", "--threads=1"]
    classes = "--model.representation.original.num_classes"
    message = _refused(["own.safetensors", "-o", "a.nern", *images], capsys)
    assert "Check the original's name, num_classes and in_chans." in message
    assert f"For a network with N classes pass {classes} N." in message
    main(["compress", "own.safetensors", "-o", "a.nern", classes, "4", "--bits=3", *images])
    assert nernlit.load("a.nern").original.num_classes == 4
    main(["compress", "a.nern", "-o", "b.nern", "--bits=2", *images])  # such a file says its network and classes
    assert Path("b.nern").stat().st_size < Path("a.nern").stat().st_size
    odd = "--model.representation.original.clases=4"
    assert f"{odd}: expected --model.representation.original.NAME=VALUE, where NAME is one of pretrained," in _refused(
        ["own.safetensors", "-o", "c.nern", odd, *images], capsys
    )


def test_the_smallest_file_that_loses_little_is_searched(capsys: pytest.CaptureFixture[str]) -> None:
    main(["compress", "digits_resnet8", "-o", "small.nern", "--target_drop=3", "--epochs=6", *DIGITS])
    shown = capsys.readouterr().out
    tried = re.findall(
        r"^([\d.]+) bits: ([+-][\d.]+) points of validation accuracy lost, (at most|above) 3", shown, re.M
    )
    assert len(tried) >= 2
    assert [float(bits) for bits, _, _ in tried] == pytest.approx([2 * 0.8**n for n in range(len(tried))], abs=0.01)
    assert [kind for _, _, kind in tried] == ["at most"] * (len(tried) - 1) + ["above"]
    assert all((float(lost) <= 3) == (kind == "at most") for _, lost, kind in tried)
    planned = [int(size.replace(",", "")) for size in re.findall(r"small.nern will have ([\d,]+) bytes", shown)]
    assert Path("small.nern").stat().st_size == pytest.approx(planned[-2], rel=0.05)


def test_a_file_is_not_replaced_by_its_own_compression(capsys: pytest.CaptureFixture[str]) -> None:
    digits_representation().save("net.nern")
    before = Path("net.nern").read_bytes()
    message = "--out net.nern is the network itself, which would be replaced; pass another file"
    assert message in _refused(["net.nern", "-o", "net.nern", *DIGITS], capsys)
    assert Path("net.nern").read_bytes() == before


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["digits_resnet8", "-o", "a.nern"], "no dataset is given: pass --data FolderDataModule --data.root DIR"),
        (["digits_resnet8", "-o", "a.nern", "--data.root=x"], "no dataset is given: pass --data FolderDataModule"),
        (["digits_resnet8", "-o", "a.zip", *DIGITS], "--out a.zip: expected a file name that ends in .nern"),
        (["gone.pt", "-o", "a.nern", *DIGITS], "no file at gone.pt; expected a file of weights, or the name of a timm"),
        (["digits_resnet8", "-o", "a.nern", *DIGITS, "--bits=0"], "--bits: 0; expected a number above 0"),
        (["gone", "--network=resnet18", "-o", "a.nern", *DIGITS], "no file at gone; expected a file of weights"),
        (
            ["digits_resnet8", "-o", "a.nern", *DIGITS, "--bits=13"],
            "target_bits=13: the file needs",
        ),
        (
            ["digits_resnet8", "-o", "a.nern", *DIGITS, "--target_bytes=200000"],
            "target_bytes=200,000: the file needs 1,",
        ),
        (["digits_resnet8", "-o", "a.nern", "--data=FolderDataModule"], "error: --data.root must be given.\n"),
        (["digits_resnet8", "-o", "a.nern", *DIGITS, "--target_bytes=900"], "target_bytes=900: the file needs"),
        (
            ["digits_resnet8", "-o", "a.nern", *DIGITS, "--bits=2", "--target_bytes=9000"],
            "argument --target_bytes: not allowed with argument --bits",
        ),
        (
            [
                *("digits_resnet8", "-o", "a.nern", *DIGITS, "--out_runs=r"),
                "--trainer.callbacks=lightning.pytorch.callbacks.EMAWeightAveraging",
            ],
            "EMAWeightAveraging would average the network that is written to the file; pass --model.ema 0.99",
        ),
        (["digits_resnet8", "-o", "a.nern", *DIGITS, "-c", "data.yaml"], "data.yaml has options of the data, which"),
        (["digits_resnet8", "-o", "a.nern", *DIGITS, "-c", "long.yaml"], "long.yaml sets trainer.max_epochs, which"),
        (["digits_resnet8", "-o", "a.nern", "--data=FolderDataModule", "--data.rot=x"], "--data.rot"),
        (
            ["digits_resnet8", "-o", "a.nern", *DIGITS, "--model.rate.target_bytes=20000"],
            "this command sets --model.rate.target_bytes; pass --target_bytes instead",
        ),
        (
            ["-c", "own.yaml", "--figures.every_n_validations", "1", "gone.pt", "-o", "a.nern", *DIGITS],
            "no file at gone.pt",
        ),
        (
            ["digits_resnet8", "-o", "a.nern", *DIGITS, "-c", "rate.yaml"],
            "rate.yaml: model.init_args.rate.target_bytes",
        ),
        (
            ["digits_resnet8", "-o", "a.nern", *DIGITS, "--model.representation.quantize.bits=4"],
            "this command sets --model.representation.quantize.bits; pass --bits instead",
        ),
        (
            ["digits_resnet8", "-o", "a.nern", *DIGITS, "--model.rate", "null"],
            "this command sets --model.rate; pass --target_bytes or --bits instead",
        ),
        (
            ["digits_resnet8", "-o", "a.nern", *DIGITS, "--trainer.max_epochs", "2"],
            "this command sets --trainer.max_epochs; pass --epochs instead",
        ),
        (
            ["digits_resnet8", "-o", "a.nern", *DIGITS, "--best_checkpoint.monitor", "val/acc"],
            "--best_checkpoint.monitor=val/acc: files have the network of a fit's end, not its best one",
        ),
    ],
)
def test_impossible_commands_are_refused(args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("data.yaml").write_text("data: {init_args: {batch_size: 100}}")
    Path("long.yaml").write_text("trainer: {max_epochs: 3}")
    Path("own.yaml").write_text("trainer: {log_every_n_steps: 5}")
    Path("rate.yaml").write_text("model: {init_args: {rate: {target_bytes: 9000}}}")
    assert message in _refused(args, capsys)
    assert not Path("a.nern").exists()
