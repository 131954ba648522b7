import csv
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.numpy import load, save
from safetensors.torch import save_file
from torch import Tensor

from nernlit.analysis import paired_difference
from nernlit.cli.main import main
from nernlit.cli.rivals import SETTINGS, Rivals
from nernlit.cli.runs import data_module
from nernlit.originals import Original
from nernlit.representation import Representation
from tests.benchmarks import nncodec_files
from tests.fakes import SharingCNN

DATA = ["--data", "DigitsDataModule"]
TINY = ["--threads=1", "--data.batch_size=500", "--epochs=1"]


def _compare(*args: str) -> None:
    main(["compare", "digits_resnet8", "--out", "out", *DATA, *args])


def _refused(run: Callable[[], None], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as error:
        run()
    assert error.value.code == 2
    return capsys.readouterr().err


def _rows() -> dict[str, dict[str, str]]:
    with Path("out/compare.csv").open() as file:
        return {row["file"]: row for row in csv.DictReader(file)}


@torch.no_grad()
def _correct(original: Original) -> Tensor:
    data = data_module(["--data=DigitsDataModule"])
    data.setup("test")
    pixels, labels = data.sources["test"][list(range(len(data.sources["test"])))]
    return original(pixels / 255).argmax(1) == labels


def test_tied_weights_are_pruned_under_all_of_their_names() -> None:
    original = Original.from_module(SharingCNN(), 10, (0.5,) * 3, (0.5,) * 3)
    network = Rivals(original, {}).untrained("prune", 0.3)
    assert isinstance(network, Representation)
    weights = network.original.net.state_dict()
    assert weights["a.weight"].equal(weights["tied.weight"])
    layers = torch.cat([weights[key].flatten() for key in ("a.weight", "own.weight", "head.weight")])
    assert float((layers != 0).double().mean()) == pytest.approx(0.3, abs=0.01)


def test_the_table_has_the_bytes_and_the_accuracies_of_the_files(capsys: pytest.CaptureFixture[str]) -> None:
    methods = ["--methods", "fp16", "svd", "prune", "round"]
    _compare(*methods, "--bits", "4", "2")
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    rows = _rows()
    assert len(rows) == 1 + len(SETTINGS["svd"]) + len(SETTINGS["prune"]) + 2
    original = Original("digits_resnet8", pretrained=True)
    rivals, reference = Rivals(original, {}), _correct(original)
    for name, row in rows.items():
        assert int(row["bytes"]) == Path("out", name).stat().st_size
        correct = _correct(rivals.read(Path("out", name)))
        assert float(row["acc"]) == pytest.approx(float(correct.float().mean()))
        assert float(row["p_value"]) == pytest.approx(paired_difference(correct, reference).p_value)
    share = {name: int(row["bytes"]) / int(row["original_bytes"]) for name, row in rows.items()}
    assert share["fp16.safetensors"] == pytest.approx(0.5, abs=0.01)
    assert share["svd_0.5.safetensors"] == pytest.approx(0.25, abs=0.02)
    assert share["round_4.nern"] == pytest.approx(4 / 32, abs=0.01)
    assert share["round_2.nern"] < share["round_4.nern"] < share["prune_0.7.nern"]
    assert float(rows["round_4.nern"]["acc"]) > 0.9
    assert any(line.startswith("round 4 ") and f"{share['round_4.nern']:.1%}" in line for line in lines)
    assert Path("out/compare.png").stat().st_size > 10_000

    times = {path: path.stat().st_mtime_ns for path in Path("out").glob("*.nern")}
    Path("out/round_4.nern").unlink()
    _compare(*methods, "--bits", "4", "2")
    shown = capsys.readouterr().out
    assert f"{len(rows) - 1} of {len(rows)} files are in out/compare.csv already" in shown
    assert "1 of 1: round 4" in shown
    changed = {path for path, time in times.items() if path.stat().st_mtime_ns != time}
    assert changed == {Path("out/round_4.nern")}
    assert _rows() == rows


def test_methods_that_train_have_the_same_budget(capsys: pytest.CaptureFixture[str]) -> None:
    methods = ["--methods", "round_distill", "table", "codebooks", "--bits", "2"]
    _compare(*methods, *TINY)
    rows = _rows()
    assert set(rows) == {"round_distill_2.nern", "table_2.nern", "codebooks_2.nern"}
    for row in rows.values():
        assert int(row["bytes"]) / int(row["original_bytes"]) == pytest.approx(2.2 / 32, abs=0.006)
        assert float(row["fit_seconds"]) > 0
    steps = {
        torch.load(path, weights_only=True)["global_step"]
        for path in Path("out/fits").glob("*/*/checkpoints/last.ckpt")
    }
    assert steps == {2}
    _compare("--methods", "fp16", "--data.batch_size=500")  # needs no budget
    assert len(_rows()) == 4
    capsys.readouterr()
    message = _refused(lambda: _compare(*methods, *TINY[:2], "--epochs=2"), capsys)
    assert "round_distill_2.nern was written with options '--threads=1 --trainer.max_epochs=1" in message
    assert "Pass another folder as --out" in message


def test_a_method_that_fails_does_not_end_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    message = _refused(lambda: _compare("--methods", "round", "fp16", "--bits", "13"), capsys)
    assert "nernlit: error: round 13: quantize.bits=13.0; expected above 0 and at most 12." in message
    assert "1 files were not written; the same command tries only those again" in message
    assert set(_rows()) == {"fp16.safetensors"}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "the following arguments are required: NET, --out"),
        (["digits_resnet8", "--out", "out"], "no dataset is given: pass --data FolderDataModule --data.root DIR"),
        (["digits_resnet8", "--out", "out", "--data", "NoImages"], "--data has no images; name a dataset"),
        (["gone.pt", "--out", "out", *DATA], "no file at gone.pt"),
        (["digits_resnet8", "--out", "out", *DATA, "--methods", "zip"], "argument --methods: invalid choice: 'zip'"),
        (["digits_resnet8", "--out", "out", *DATA, "--bits", "0"], "--bits: 0; expected a number above 0"),
        (["digits_resnet8", "--out", "out", *DATA, "--methods", "svd", "--bits", "2"], "--bits is for round, round"),
        (
            ["digits_resnet8", "--out", "out", *DATA, "--methods", "svd", "--epochs", "2"],
            "--epochs 2 is for methods that train",
        ),
        (
            ["digits_resnet8", "--out", "out", *DATA, "--epochs", "1", "--trainer.max_epochs", "2"],
            "this command sets --trainer.max_epochs; pass --epochs instead",
        ),
        (
            ["digits_resnet8", "--out", "out", *DATA, "--methods", "table", "--trainer.logger.init_args.name=x"],
            "this command sets --trainer.logger.name; it chooses the folders of its fits; leave it out",
        ),
        (
            ["digits_resnet8", "--out", "out", *DATA, "--methods", "table", "--model.rate.kept=fp16"],
            "--model.rate.kept=fp16: this command sets --model.rate.kept; leave it out",
        ),
        (
            [
                "digits_resnet8",
                "--out",
                "out",
                *DATA,
                "--methods=round_distill",
                "--model.representation.quantize.bits=8",
            ],
            "this command sets --model.representation.quantize.bits; leave it out",
        ),
        (
            ["digits_resnet8", "--out", "out", *DATA, "--methods", "fp16", "--data.eval_sets", "[Corrupted]"],
            "--data.eval_sets: the rows are of the dataset's own test images; leave it out",
        ),
        (["digits_resnet8", "--out", "out", "--data", "null", "--methods", "fp16"], "--data has no images; name a"),
        (
            ["digits_resnet8", "--out", "out", *DATA, "--methods", "table", "--schedule", "paper"],
            "--schedule=paper: this command has one schedule; leave it out",
        ),
    ],
)
def test_impossible_comparisons_are_refused(args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in _refused(lambda: main(["compare", *args]), capsys)
    assert not Path("out").exists()


def _other(monkeypatch: pytest.MonkeyPatch) -> Path:
    """Files of a program that stores half precision, written by the script that runs NNCodec."""
    codec = ModuleType("nncodec.nn")
    codec.encode = lambda state, args: bytearray(save({k: v.astype("float16") for k, v in state.items()}))
    codec.decode = lambda content: {k: v.astype("float32") for k, v in load(bytes(content)).items()}
    monkeypatch.setitem(sys.modules, "nncodec", ModuleType("nncodec"))
    monkeypatch.setitem(sys.modules, "nncodec.nn", codec)
    save_file(Original("digits_resnet8", pretrained=True).net.state_dict(), "net.safetensors")
    nncodec_files.main(["net.safetensors", "--qp", "-38", "-20", "--out", "other"])
    return Path("other/files.csv")


def test_files_of_another_program_are_measured_in_the_same_way(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table = _other(monkeypatch)
    _compare("--methods", "fp16", "--others", str(table))
    shown = capsys.readouterr().out
    rows = _rows()
    assert list(rows) == ["nncodec_-38.nnc", "nncodec_-20.nnc", "fp16.safetensors"]
    own, other = rows["fp16.safetensors"], rows["nncodec_-38.nnc"]
    assert (other["method"], other["setting"]) == ("nncodec", "-38.0")
    assert int(other["bytes"]) == Path("other/nncodec_-38.nnc").stat().st_size
    assert Path("out/nncodec_-38.nnc").read_bytes() == Path("other/nncodec_-38.nnc").read_bytes()
    for name in ("original", "data", "original_bytes", "acc_original", "acc", "difference", "p_value"):
        assert other[name] == own[name]
    assert any(line.startswith("nncodec -20 ") for line in shown.splitlines())

    _compare("--methods", "fp16", "--others", str(table))
    assert len(_rows()) == 3
    _compare("--methods", "fp16")  # the table keeps them
    assert set(_rows()) == set(rows)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "--others other/files.csv: there is no such file; expected a CSV with the columns method, setting"),
        ("a,b\n1,2\n", "is not a table of this version of nernlit; expected a CSV with the columns method, setting"),
        ("method,setting,file,weights\n", "--others other/files.csv lists no file; expected a CSV with the columns"),
        (
            "method,setting,file,weights\nx,high,nncodec_-20.nnc,nncodec_-20.safetensors\n",
            "line 2: setting is 'high', which is invalid",
        ),
        (
            "method,setting,file,weights\ntable,2,nncodec_-20.nnc,nncodec_-20.safetensors\n",
            "method 'table'; expected a name of letters, digits, '_', '-' and '.' that is none of fp16, svd",
        ),
        (
            "method,setting,file,weights\n../x,2,nncodec_-20.nnc,nncodec_-20.safetensors\n",
            "method '../x'; expected a name of letters",
        ),
        (
            "method,setting,file,weights\n" + 2 * "x,2,nncodec_-20.nnc,nncodec_-20.safetensors\n",
            "x 2 is listed twice; leave one out",
        ),
        (
            "method,setting,file,weights\nx,2,gone.nnc,nncodec_-20.safetensors\n",
            "there is no file other/gone.nnc; paths are relative to the table",
        ),
        ("method,setting,file,weights\nx,2,nncodec_-20.nnc,files.csv\n", "cannot read weights from other/files.csv: "),
    ],
)
def test_tables_of_other_files_are_checked(
    content: str | None, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table = _other(monkeypatch)
    table.unlink() if content is None else table.write_text(content)
    assert message in _refused(lambda: _compare("--methods", "fp16", "--others", str(table)), capsys)
    assert not Path("out").exists()


@pytest.mark.parametrize(("name", "bits", "price"), [("cifar_resnet20", 8, "0.019"), ("digits_resnet8", 6, None)])
def test_codebooks_have_as_many_codewords_as_a_network_can_use(name: str, bits: int, price: str | None) -> None:
    options = Rivals(Original(name), {"name": name}).fit_options("codebooks", 1.5)
    values = dict(option.removeprefix("--model.representation.predictor.").split("=", 1) for option in options[3:])
    assert (values["bits"], values.get("price")) == (str(bits), price)


def test_a_configuration_of_another_content_is_another_budget(capsys: pytest.CaptureFixture[str]) -> None:
    line = ["--methods", "table", "-c", "own.yaml", *TINY, "--bits"]
    Path("own.yaml").write_text("model: {optimizer: {init_args: {lr: 0.01}}}")
    _compare(*line, "3")
    Path("own.yaml").write_text("model: {optimizer: {init_args: {lr: 0.02}}}")
    capsys.readouterr()
    assert "table_3.nern was written with options" in _refused(lambda: _compare(*line, "2"), capsys)


def test_a_network_that_is_normalized_in_another_way_is_another_network(capsys: pytest.CaptureFixture[str]) -> None:
    _compare("--methods", "fp16")
    mean = ["--model.representation.original.mean", "[0.6]"]
    said = _refused(lambda: _compare("--methods", "svd", *mean), capsys)
    assert "mean=[0.6]" in said
