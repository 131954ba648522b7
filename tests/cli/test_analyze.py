"""`nernlit analyze` on two small fits of digits."""

import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import nernlit
from nernlit.analysis import smoothing
from nernlit.analysis.landscape import Evaluation
from nernlit.cli.analyses import _walks
from nernlit.cli.analyze import main as analyze
from nernlit.cli.main import main, run
from nernlit.cli.runs import Run
from nernlit.errors import NernlitError, UsageError
from nernlit.kernels import LayerFilter
from nernlit.originals import Original
from nernlit.predictors import MLP, Table
from nernlit.representation import Representation
from tests.fakes import CONFIGS, QUICK
from tests.representation.test_keep_zeros import _pruned


@pytest.fixture(scope="module")
def fits(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A Recon-only fit, and a Progressive one of two rounds."""
    root = tmp_path_factory.mktemp("fits")
    logger = f"--trainer.logger.init_args.save_dir={root}"
    first = run(["fit", *QUICK, logger])
    rest = ["--trainer.max_epochs=4", "--trainer.check_val_every_n_epoch=1", "--model.rounds=2", "--model.trials=1"]
    quick = [str(CONFIGS / "digits_h128.yaml") if "digits_h96" in arg else arg for arg in QUICK]
    second = run(["fit", *quick, logger, *rest, "--model.min_delta=null"])
    return [first.trainer.log_dir, second.trainer.log_dir]


def _analysed(*args: str) -> list[dict[str, float]]:
    """The rows of an analysis, which must have written one file of them."""
    before = set(Path("out").glob("*.json"))
    main(["analyze", *args])
    (file,) = set(Path("out").glob("*.json")) - before
    rows: list[dict[str, float]] = json.loads(file.read_text())["rows"]
    return rows


OUT = ("--out", "out", "--images", "100")
WITH_ORIGINAL = ("--original", "original.safetensors")
WITH_DATA = ("--data", "DigitsDataModule")


def test_interpolation_begins_at_the_original_and_ends_at_the_run(fits: list[str]) -> None:
    rows = _analysed("interpolate", fits[0], *OUT, "--points", "3", "--low", "0", "--high", "1")
    representation = Run.open(fits[0]).representation()
    (pixels, labels), *others = Run.open(fits[0]).batches("test", 100)
    assert not others
    with torch.no_grad():
        networks = [representation.original(pixels), representation(pixels)]
    accuracies = [float((logits.argmax(1) == labels).float().mean()) for logits in networks]
    assert [rows[0]["accuracy"], rows[2]["accuracy"]] == pytest.approx(accuracies)
    assert rows[0]["distance"] == 0
    assert rows[1]["distance"] == pytest.approx(rows[2]["distance"] / 2)
    (figure,) = Path("out").glob("interpolate_*.png")
    assert figure.stat().st_size > 5_000


def test_layers_and_spectra_have_a_row_a_layer(fits: list[str]) -> None:
    layers = [layer.key.removesuffix(".weight") for layer in Run.open(fits[0]).representation().layout.layers]
    for kind in ("spectrum", "layers"):
        assert [row.get("layer", row.get("name")) for row in _analysed(kind, fits[0], "--out", "out")] == layers


def test_what_an_analysis_does_not_use_is_refused(fits: list[str]) -> None:
    for args, message in {
        ("spectrum", fits[0], "--split", "train"): "`analyze spectrum` has no option --split",
        (
            "layers",
            fits[0],
            "--imges",
            "5",
        ): "unrecognized arguments: --imges 5; `nernlit analyze --help` lists the options",
        ("smooth", fits[0], "--batch_norm", "reestimated"): "`analyze smooth` has no option --batch_norm",
        ("layers", fits[0], "--data.root", "x"): "`analyze layers` does not use data; leave out --data.root=x",
        ("layers", fits[0], "--spl", "train"): "unrecognized arguments: --spl train",
        ("landscape", fits[0], "--points", "1"): "--points 1: a plane needs at least 2 points a side",
        ("landscape", fits[0], "--points", "0"): "argument --points: 0; expected an integer of at least 1",
        ("landscape", fits[0], "--points", "-3"): "argument --points: -3; expected an integer of at least 1",
        ("interpolate", fits[0], "--points", "many"): "argument --points: many; expected an integer",
        ("interpolate", fits[0], "--low", "nan"): "argument --low: nan; expected a finite number",
        ("interpolate", fits[0], "--high", "inf"): "argument --high: inf; expected a finite number",
        ("interpolate", fits[0], "--low", "1", "--high", "1"): "--low 1 --high 1: expected the low end first",
        ("smooth", fits[0], "--images", "0"): "argument --images: 0; expected an integer of at least 1",
        ("smooth", fits[0], "--images", "361"): "--images 361: the test split has 360 images",
        ("smooth", fits[0], "--out", "file/out"): "--out file/out: file is a file; expected a folder",
        ("rounds", *fits): "`analyze rounds` takes 1 run; 2 were given",
        ("landscape", fits[0], fits[0]): "best.ckpt is given twice",
        ("spectrum", *fits[:1], fits[0] + "/checkpoints/last.ckpt", fits[0] + "/checkpoints/last.ckpt"): "given twice",
        ("layers", fits[0] + "/checkpoints/last.ckpt", "--select", "best"): "last.ckpt is a checkpoint already",
    }.items():
        Path("file").touch()
        with pytest.raises(UsageError, match=message):
            analyze(args)
        assert [path.name for path in Path().iterdir()] == ["file"]


def test_every_setting_has_a_file_of_its_own(fits: list[str]) -> None:
    kind, last = ("interpolate", fits[0], "--images", "30"), fits[0] + "/checkpoints/last.ckpt"
    for options in (
        ("--points", "2"),
        ("--points", "2", "--batch_norm", "reestimated"),
        ("--points", "2", "--split", "train"),
        ("--points", "2", "--low", "0"),
        ("--points", "2", "--high", "2"),
        ("--points", "2", "--select", "last"),
        ("--points", "2", "--data.eval_batch_size", "7"),
    ):
        assert len(_analysed(*kind, *options, "--out", "out")) == 2
    for runs in ([fits[0]], [last], fits, [fits[0], last]):
        _analysed("layers", *runs, "--out", "out")
    main(["analyze", "layers", fits[0]])
    main(["analyze", "layers", last])
    folder = Path(fits[0], "analysis")
    assert {file.name for file in folder.glob("layers*.json")} == {"layers.json", "layers_last.json"}


def test_an_analysis_replaces_its_own_file_only(fits: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        main(["analyze", "layers", fits[0], "--out", "out"])
    (file,) = Path("out").glob("*.json")
    copy = shutil.copytree(fits[0], Path("other", *Path(fits[0]).parts[-2:]))  # a run of the same name
    with pytest.raises(SystemExit):
        main(["analyze", "layers", str(copy), "--out", "out"])
    assert "layers_digits_h96-version_0.json belongs to another analysis; move it" in capsys.readouterr().err
    assert json.loads(file.read_text())["runs"].keys() == {"digits_h96/version_0"}


def test_a_plane_holds_runs_of_one_original(fits: list[str]) -> None:
    state = Original("digits_resnet8", pretrained=True).net.state_dict()
    save_file({key: value + 0.001 if value.is_floating_point() else value for key, value in state.items()}, "w.st")
    given = ("--model.representation.original.pretrained=false", "--model.representation.original.checkpoint=w.st")
    other = run(["fit", *QUICK, *given]).trainer.log_dir
    with pytest.raises(UsageError, match="represent different originals, so no plane contains the original of both"):
        analyze(["landscape", fits[0], str(other), *OUT])
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"config\.yaml is empty"),
        ("[1, 2]", "holds no options; expected a YAML mapping"),
        ("data: {a: [", "is not valid YAML"),
        ('data: !!python/object/apply:os.system ["touch pwned"]', "is not a valid configuration: could not determine"),
        ("data: null", r"was fitted without data; name it: --data=CIFAR10DataModule --data\.root=DIR"),
        ("trainer: {}", "was fitted without data"),
        ("data: {class_path: os.system, init_args: {command: touch pwned}}", "os.system"),
        ("data: [1, 2]", "--data .*: expected one of CIFAR100DataModule"),
        ("data: {class_path: DigitsDataModule, init_args: {batch_size: 1.0e+300}}", "batch_size"),
        (
            "data: {class_path: DigitsDataModule, init_args: {batch_size: 2001-13-44}}",
            "is not a valid configuration: month must be",
        ),
        (
            "a: &a [x, x, x, x, x, x, x, x, x, x]\n"
            + "".join(
                f"{name}: &{name} [{', '.join(['*' + above] * 10)}]\n"
                for above, name in zip("abcdefg", "bcdefgh", strict=True)
            ),
            "has more than 100,000 values",
        ),
    ],
    ids=lambda value: value[:20],
)
def test_a_damaged_configuration_of_a_run_is_one_line(
    content: str, message: str, fits: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(fits[0], "run")
    Path(folder, "config.yaml").write_text(content)
    for line in (["analyze", "smooth", folder, *OUT], ["report", folder]):
        with pytest.raises(SystemExit) as caught:
            main(line)
        assert caught.value.code == 2
        said = capsys.readouterr().err
        assert re.match(f"nernlit: error: .*{message}", said)
        assert said.count("\n") == 1
        assert [path.name for path in Path().iterdir()] == ["run"]
    analyze(["layers", folder])  # looks at no data


def test_what_is_not_finite_is_null_in_json(fits: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nernlit.cli.analyses.evaluate", lambda *_: Evaluation(math.inf, math.nan))
    (row,) = _analysed("interpolate", fits[0], *OUT, "--points", "1", "--low", "1")
    assert row["loss"] is row["accuracy"] is None
    assert row["share"] == 1


def test_work_on_images_says_how_far_it_is(fits: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    left: dict[str, int] = {}

    @contextmanager
    def recorded(description: str, total: int) -> Iterator[Callable[[int], None]]:
        left[description] = total

        def advance(done: int) -> None:
            left[description] -= done

        yield advance

    for module in ("cli.analyses", "analysis.landscape", "cli.report"):
        monkeypatch.setattr(f"nernlit.{module}.progress", recorded)
    analyze(["interpolate", fits[1], *OUT, "--points", "3"])
    analyze(["landscape", fits[1], *OUT, "--points", "2"])
    analyze(["rounds", fits[1], *OUT])
    analyze(["smooth", fits[1], *OUT])
    main(["report", fits[1]])
    assert set(left) == {
        "measuring 3 points of a line",
        "measuring 4 points of a plane",
        "testing 2 rounds",
        "testing 15 networks",
        "testing digits_h128/version_0",
    }
    assert set(left.values()) == {0}


def test_numbers_are_whole_in_a_narrow_terminal(
    fits: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for columns in ("80", "60", "30"):
        monkeypatch.setenv("COLUMNS", columns)
        shutil.rmtree("out", ignore_errors=True)
        rows = _analysed("smooth", fits[1], *OUT)
        shown = capsys.readouterr().out.split()
        for row in rows:
            assert {f"{value:.4g}" for value in row.values() if not isinstance(value, str)} <= set(shown)


def test_runs_of_one_name_are_told_apart(fits: list[str]) -> None:
    rows = _analysed("layers", fits[0], fits[0] + "/checkpoints/last.ckpt", "--out", "out")
    assert {str(row["run"]).rsplit("/", 1)[1] for row in rows} == {"best", "last"}


def test_landscapes_of_one_run_and_of_two(fits: list[str]) -> None:
    around = _analysed("landscape", fits[0], *OUT, "--points", "3")
    assert len(around) == 9
    center = next(row for row in around if row["x"] == row["y"] == 0)
    (end,) = _analysed("interpolate", fits[0], *OUT, "--points", "1", "--low", "1")
    assert center["loss"] == pytest.approx(end["loss"], rel=1e-4)
    assert len(_analysed("landscape", *fits, *OUT, "--points", "2")) == 4
    with pytest.raises(SystemExit):
        main(["analyze", "landscape", *fits, fits[0]])


def test_rounds_and_smoothing_are_compared_with_the_original(fits: list[str]) -> None:
    rounds = _analysed("rounds", fits[1], *OUT)
    assert [row["round"] for row in rounds] == [1, 2]
    smooth = _analysed("smooth", fits[1], *OUT)
    names = [str(row["weights"]) for row in smooth]
    assert names[0] == "reconstructed"
    assert names[-1] == "mean of 2 rounds"
    assert smooth[0]["accuracy"] == pytest.approx(rounds[1]["accuracy"])
    assert all(row["low"] <= row["difference"] <= row["high"] for row in smooth)


def test_what_is_no_run_is_refused(fits: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(
        UsageError, match=r"nowhere is not a run: no checkpoints/best.ckpt in it or in a version_\* below"
    ):
        Run.open("nowhere")
    with pytest.raises(SystemExit):
        main(["analyze", "rounds", fits[0]])
    assert "has no rounds/rounds.json, so it is not a Progressive run" in capsys.readouterr().err
    assert Run.open(Path(fits[0]).parent).folder == Run.open(fits[0]).folder
    assert Run.open(Run.open(fits[0]).checkpoint) == Run.open(fits[0])


@pytest.fixture
def nern(fits: list[str]) -> str:
    """The .nern file of the first fit, and its original's weights, in the working directory."""
    Run.open(fits[0]).representation().save("net.nern")
    save_file(Original("digits_resnet8", pretrained=True).net.state_dict(), "original.safetensors")
    return "net.nern"


@pytest.fixture
def tuned(fits: list[str]) -> str:
    """A .nern file with other kept tensors than its original's, folded, and the original's weights."""
    original = Original("digits_resnet8", pretrained=True)
    save_file(original.net.state_dict(), "original.safetensors")
    representation = Representation(original, Table(), order="none", tune_kept="affine")
    with torch.no_grad():
        for value in representation.tuned.parameters():
            value.add_(0.3)
    representation.save("tuned.nern", fold_batch_norm=True)
    return "tuned.nern"


def _accuracy(network: Callable[[torch.Tensor], torch.Tensor], images: int | None = 100) -> float:
    batches = Run.open("tuned.nern").batches("test", images, ["--data=DigitsDataModule"])
    with torch.no_grad():
        return float(torch.cat([network(pixels).argmax(1) == labels for pixels, labels in batches]).float().mean())


def test_analyses_compare_the_file_with_its_trained_kept_tensors_with_the_original(tuned: str) -> None:
    original = Original("digits_resnet8", pretrained=True).freeze()
    expected = _accuracy(original), _accuracy(nernlit.load(tuned))
    assert expected[0] > expected[1]
    line = _analysed("interpolate", tuned, *OUT, "--points=2", "--low=0", "--high=1", *WITH_ORIGINAL, *WITH_DATA)
    assert [row["accuracy"] for row in line] == pytest.approx(expected)
    assert line[1]["distance"] > 1
    smoothed = _analysed("smooth", tuned, *OUT, *WITH_ORIGINAL, *WITH_DATA)
    assert smoothed[0]["accuracy"] == pytest.approx(expected[1])
    assert smoothed[0]["difference"] == pytest.approx(expected[1] - expected[0])
    plane = _analysed("landscape", tuned, *OUT, "--points=3", *WITH_DATA)
    (center,) = [row for row in plane if row["x"] == row["y"] == 0]
    assert center["accuracy"] == pytest.approx(expected[1])


def test_a_file_is_exported_and_reported_with_its_own_kept_tensors(tuned: str) -> None:
    main(["export", tuned, *WITH_ORIGINAL, "-o", "again.nern"])
    images = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    one, other = (nernlit.load(file)(images) for file in (tuned, "again.nern"))
    assert torch.allclose(one, other, atol=1e-3)
    main(["report", tuned, *WITH_ORIGINAL, *WITH_DATA, "--out=report.html"])
    page = Path("report.html").read_text(encoding="utf-8")
    assert f"{_accuracy(nernlit.load(tuned), None):.2%}".rstrip("%") in page


def test_kept_zeros_are_weights_when_a_network_is_smoothed() -> None:
    representation = Representation(_pruned(0.3), MLP(8, kernel_size=5), order="none", keep_zeros=True)
    target, order = representation.target, _walks(representation)
    smoothed = smoothing.gaussian_smooth(target, order, 0.2, representation.learned.weight_mask())
    assert torch.allclose(smoothed, target, atol=1e-3)  # hardly any smoothing: they are not filled from their neighbors
    assert not torch.allclose(
        smoothing.gaussian_smooth(target, order, 0.2, representation.learned.mask()), target, atol=1e-3
    )


def test_an_analysis_of_a_file_with_its_original_is_that_of_the_fit(fits: list[str], nern: str) -> None:
    for kind, data in {"spectrum": (), "layers": (), "smooth": WITH_DATA}.items():
        options = ("--out", "out", *(("--images", "50") if data else ()))
        of_fit = _analysed(kind, fits[0], *options)
        of_file = _analysed(kind, nern, *options, *WITH_ORIGINAL, *data)
        assert len(of_file) == len(of_fit)
        for one, other in zip(of_file, of_fit, strict=True):
            numbers = [{key: value for key, value in row.items() if not isinstance(value, str)} for row in (one, other)]
            assert numbers[0] == pytest.approx(numbers[1], rel=1e-4, abs=1e-6)
    beside = [nern, fits[1]]
    assert {row["run"] for row in _analysed("layers", *beside, "--out", "out", *WITH_ORIGINAL)} == {
        "net.nern",
        Run.open(fits[1]).name,
    }
    main(["analyze", "layers", nern, *WITH_ORIGINAL])
    assert Path("analysis/layers_net.nern.png").is_file()


def test_a_plane_around_a_file_needs_no_original(nern: str) -> None:
    rows = _analysed("landscape", nern, *OUT, "--points", "3", *WITH_DATA)
    (center,) = [row for row in rows if row["x"] == row["y"] == 0]
    (pixels, labels), *_ = Run.open(nern).batches("test", 100, ["--data=DigitsDataModule"])
    with torch.no_grad():
        answers = Run.open(nern).representation()(pixels).argmax(1)
    assert center["accuracy"] == pytest.approx(float((answers == labels).float().mean()))


def test_what_a_file_does_not_hold_is_named(fits: list[str], nern: str) -> None:
    Path("damaged.nern").write_bytes(Path(nern).read_bytes()[:-9])
    other = Representation(Original("digits_resnet8", pretrained=True), MLP(8), LayerFilter(exclude=["conv1"]))
    other.save("other.nern")
    save_file(Original("digits_resnet8").net.state_dict(), "wrong.safetensors")
    before = set(Path().iterdir())
    holds_no = r"compares with the original, which net\.nern does not hold; pass its weights: --original FILE"
    wrong_data = ("--data", "CIFAR10DataModule", "--data.root", "nowhere")
    for args, message in {
        ("spectrum", nern): f"`analyze spectrum` {holds_no}",
        ("layers", nern, fits[0]): f"`analyze layers` {holds_no}",
        ("interpolate", nern, *WITH_DATA): f"`analyze interpolate` {holds_no}",
        ("smooth", nern, *WITH_DATA): f"`analyze smooth` {holds_no}",
        ("landscape", nern, fits[0], *WITH_DATA): f"`analyze landscape` {holds_no}",
        ("rounds", nern, *WITH_DATA): r"net\.nern is a \.nern file, which holds no rounds; pass the folder of the fit",
        ("landscape", nern): r"net\.nern names no data; name it: --data=CIFAR10DataModule",
        ("landscape", nern, "--data.eval_batch_size", "7"): r"net\.nern names no data; name it",
        ("landscape", nern, "--data", "NoImages"): "--data has no images; name a dataset",
        ("landscape", nern, *wrong_data): r"(in_chans|channels|nowhere)",
        ("layers", nern, "--select", "best"): r"--select best: net\.nern holds one representation; leave --select out",
        ("layers", "damaged.nern", *WITH_ORIGINAL): r"damaged\.nern is damaged: its checksum is wrong",
        ("layers", "gone.nern", *WITH_ORIGINAL): r"gone\.nern is missing",
        ("layers", nern, "--original", "wrong.safetensors"): r"wrong\.safetensors is not the original of net\.nern",
        ("layers", nern, "--original", "gone.safetensors"): r"gone\.safetensors",
        ("layers", nern, nern, *WITH_ORIGINAL): r"net\.nern is given twice; pass each run once",
        ("layers", "other.nern", fits[0], *WITH_ORIGINAL): "represent networks of different layers",
    }.items():
        with pytest.raises(NernlitError, match=message) as caught:
            analyze(args)
        assert "\n" not in str(caught.value)
        assert set(Path().iterdir()) == before
