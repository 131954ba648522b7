"""`nernlit analyze` on two small fits of digits."""

import json
from pathlib import Path

import pytest
import torch

from nernlit.analyze import main as analyze
from nernlit.cli import main, run
from nernlit.errors import UsageError
from nernlit.runs import Run
from tests.fakes import CONFIGS, QUICK


@pytest.fixture(scope="module")
def fits(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A Recon-only fit, and a Progressive one of two rounds."""
    root = tmp_path_factory.mktemp("fits")
    logger = f"--trainer.logger.init_args.save_dir={root}"
    first = run(["fit", *QUICK, logger])
    rest = ["--trainer.max_epochs=4", "--trainer.check_val_every_n_epoch=1", "--model.rounds=2", "--model.trials=1"]
    quick = [str(CONFIGS / "digits_h128.yaml") if "digits_h64" in arg else arg for arg in QUICK]
    second = run(["fit", *quick, logger, *rest, "--model.min_delta=null"])
    return [first.trainer.log_dir, second.trainer.log_dir]


def _analysed(*args: str) -> list[dict[str, float]]:
    main(["analyze", *args])
    rows: list[dict[str, float]] = json.loads(Path("out", f"{args[0]}.json").read_text())
    return rows


OUT = ("--out", "out", "--images", "100")


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
    assert Path("out/interpolate.png").stat().st_size > 5_000


def test_layers_and_spectra_have_a_row_a_layer(fits: list[str]) -> None:
    layers = [layer.key.removesuffix(".weight") for layer in Run.open(fits[0]).representation().layout.layers]
    for kind in ("spectrum", "layers"):
        assert [row.get("layer", row.get("name")) for row in _analysed(kind, fits[0], "--out", "out")] == layers


def test_what_an_analysis_does_not_use_is_refused(fits: list[str]) -> None:
    for args, message in {
        ("spectrum", fits[0], "--split", "train"): "`analyze spectrum` has no use for --split",
        ("layers", fits[0], "--imges", "5"): "`analyze layers` looks at no data; leave out --imges 5",
        ("smooth", fits[0], "--batch_norm", "reestimated"): "`analyze smooth` has no use for --batch_norm",
        ("rounds", *fits): "`analyze rounds` takes 1 run; 2 were given",
        ("landscape", fits[0], fits[0]): "best.ckpt is given twice",
        ("spectrum", *fits[:1], fits[0] + "/checkpoints/last.ckpt", fits[0] + "/checkpoints/last.ckpt"): "given twice",
    }.items():
        with pytest.raises(UsageError, match=message):
            analyze(args)


def test_runs_of_one_name_are_told_apart(fits: list[str]) -> None:
    rows = _analysed("layers", fits[0], fits[0] + "/checkpoints/last.ckpt", "--out", "out")
    assert {str(row["run"]).rsplit("/", 1)[1] for row in rows} == {"best", "last"}


def test_landscapes_of_one_run_and_of_two(fits: list[str]) -> None:
    around = _analysed("landscape", fits[0], *OUT, "--points", "3")
    assert len(around) == 9
    centre = next(row for row in around if row["x"] == row["y"] == 0)
    (end,) = _analysed("interpolate", fits[0], *OUT, "--points", "1", "--low", "1")
    assert centre["loss"] == pytest.approx(end["loss"], rel=1e-4)
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
    with pytest.raises(UsageError, match=r"nowhere is no run: no checkpoints/best.ckpt in it or in a version_\* below"):
        Run.open("nowhere")
    with pytest.raises(SystemExit):
        main(["analyze", "rounds", fits[0]])
    assert "has no rounds/rounds.json: it is no run of Progressive" in capsys.readouterr().err
    assert Run.open(Path(fits[0]).parent).folder == Run.open(fits[0]).folder
    assert Run.open(Run.open(fits[0]).checkpoint) == Run.open(fits[0])
