"""`nernlit sweep`: what it says, and how it ends where fits, options or its table are wrong."""

import csv
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

import nernlit
from nernlit.cli import sweep as command
from nernlit.cli.main import main
from nernlit.cli.runs import Run
from nernlit.cli.sweep import main as sweep
from nernlit.cli.sweep_plan import Fit
from nernlit.cli.sweep_table import Row, print_summary, read_rows
from nernlit.errors import NernlitError, UsageError
from tests.fakes import CONFIGS, QUICK, digits_representation

REST = QUICK[2:]


def _config(name: str, more: str = "") -> str:
    """A configuration of the working directory that builds on the digits' one."""
    Path(name).write_text(f"base: [{Path(QUICK[1]).resolve()}]\n{more}")
    return name


def _rows() -> list[dict[str, str]]:
    with Path("swept/sweep.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_failing_configuration_does_not_end_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    configs = [_config("good.yaml"), _config("bad.yaml", "model: {init_args: {loss: mae}}\n"), _config("best.yaml")]
    line = ["sweep", "--configs", *configs, "--out", "swept", *REST]
    with pytest.raises(SystemExit) as caught:
        main(line)
    assert caught.value.code == 2
    shown, said = capsys.readouterr()
    assert re.search(r"^fit 1 of 3: good, seed 0$", shown, re.MULTILINE)
    assert re.search(r"^fit 2 of 3, about \d+ seconds? left: bad, seed 0$", shown, re.MULTILINE)
    assert re.search(r"^fit 3 of 3, about \d+ seconds? left: best, seed 0$", shown, re.MULTILINE)
    assert re.search(r"bad, seed 0 +- +- +failed +-", shown)
    assert re.search(r"^failed: bad, seed 0: .*mae.*mse", shown, re.MULTILINE)
    assert "nernlit: error: bad, seed 0: " in said
    assert "nernlit: error: 1 of 3 fits failed; swept/sweep.csv holds the others" in said
    assert "Traceback" not in said
    assert [row["config"] for row in _rows()] == ["good", "best"]
    assert Path("swept/sweep.png").is_file()
    with pytest.raises(NernlitError, match="1 of 3 fits failed"):
        sweep(line[1:])  # the two others are not fitted again
    assert "2 of 3 fits are in swept/sweep.csv already" in capsys.readouterr().out
    assert len(_rows()) == 2


def test_an_unforeseen_error_and_an_interrupt(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row = dict.fromkeys(
        ("acc_original", "cr_paper", "cr_file", "acc", "difference", "recon_rmse", "fit_seconds"), "0.5"
    )
    outcomes: list[Any] = [
        {**row, "hidden": "8", "peak_memory_mib": "1"},
        RuntimeError("no\nmemory"),
        KeyboardInterrupt(),
    ]

    def fit(*arguments: Any) -> Row:
        outcome = outcomes.pop(0)
        if isinstance(outcome, BaseException):
            raise outcome
        return dict(outcome)

    monkeypatch.setattr(command, "_fit", fit)
    with pytest.raises(KeyboardInterrupt):
        sweep(["--configs", QUICK[1], "--seeds", "0", "1", "2", "3", "--out", "swept"])
    shown, said = capsys.readouterr()
    assert "failed: digits_h96, seed 1: RuntimeError: no memory" in shown
    assert "Traceback" in said  # an error of ours
    assert not outcomes  # the interrupt ended the sweep
    assert [row["seed"] for row in _rows()] == ["0"]
    assert not Path("swept/sweep.png").exists()


def test_fits_of_a_sweep_go_on_from_a_file() -> None:
    digits_representation(12).save("net.nern")
    rest = [option for option in REST if "representation" not in option and "steps_per_epoch" not in option]
    start = ["--model.representation=null", "--model.init_from=net.nern", "--model.reconstruction.steps=0"]
    start.append("--model.cross_entropy_weight=1")  # the network has nothing to learn from itself
    sweep(["--configs", str(CONFIGS / "digits_h96_decoupled.yaml"), "--out", "swept", *rest, *start])
    (row,) = _rows()
    assert row["hidden"] == "12"
    stored = nernlit.load("net.nern").sizes()
    assert float(row["cr_paper"]) == stored.cr_paper
    assert float(row["cr_file"]) == pytest.approx(stored.cr_file, rel=0.01)  # the fit adds class names
    stored_file = Run.open("net.nern")  # its network is what the fit started from
    (pixels, labels), *others = stored_file.batches("test", overrides=["--data=DigitsDataModule"])
    assert not others
    with torch.no_grad():
        answers = stored_file.representation()(pixels).argmax(1)
    assert float(row["acc_original"]) == pytest.approx(float((answers == labels).float().mean()))


def test_a_dry_run_prints_a_command_for_each_unfinished_fit_and_runs_nothing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = _config("it's mine.yaml")
    line = ["sweep", "--configs", config, "--seeds", "0", "1", "--out", "a b", *REST, "--trust"]
    main([*line, "--dry-run"])
    first, second = capsys.readouterr().out.splitlines()
    assert not Path("a b").exists()
    program, *args = shlex.split(first)
    assert program == "nernlit"
    assert args == ["sweep", "--configs", config, "--seeds", "0", "--select", "best", "--out", "a b", *REST, "--trust"]
    main(args)
    capsys.readouterr()
    main([*line, "--dry-run"])  # the fit that the command ran is one of this sweep
    shown, said = capsys.readouterr()
    assert shown.splitlines() == [second]
    assert said == "1 of 2 fits are in a b/sweep.csv already\n"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--seed", "3"], "--seed"),
        (["--hid", "4"], "--hid"),
        (["--dry"], "there is no option --dry; did you mean --dry-run?"),
        (["--hidden", "0"], "argument --hidden: 0; expected a whole number of at least 1"),
        (["--seeds", "-1"], "argument --seeds: -1; expected a whole number of at least 0"),
        (["--select", "first"], "argument --select: invalid choice: 'first'"),
        (["--out", "file"], "--out file: file is a file; expected a folder"),
        (["--out", "file/swept"], "--out file/swept: file is a file"),
        (["--configs", "nowhere.yaml"], r"no configuration file nowhere\.yaml"),
        (["--configs", "digits_h69"], r"no configuration file digits_h69 \(did you mean digits_h96"),
        (["--configs", "a/x.yaml", "b/x.yaml"], "2 files are named x; rename them"),
        (["--seed_everything", "3"], "--seed_everything 3: a sweep sets it itself; pass --seeds"),
        (["--ckpt_path=last"], "--ckpt_path last: a sweep sets it itself; its fits start anew"),
        (["--trainer.logger.init_args.save_dir=x"], "a sweep sets it itself; pass --out"),
        (["--hidden", "4", "--model.representation.predictor.hidden", "8"], "8 and --hidden: both are the width"),
        (["--trainer.devices=2"], "--trainer.devices 2: a sweep's fits run on one device"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_options_end_a_sweep_before_its_first_fit(
    args: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("file").touch()
    configs = [] if "--configs" in args else ["--configs", QUICK[1]]
    with pytest.raises(SystemExit) as caught:
        main(["sweep", *configs, *args])
    assert caught.value.code == 2
    shown, said = capsys.readouterr()
    assert re.search(rf"nernlit: error: .*{message}", said)
    assert "Traceback" not in said
    assert "failed:" not in shown
    assert [path.name for path in Path().iterdir()] == ["file"]


def test_a_folder_in_the_tables_place_is_named() -> None:
    Path("sweep.csv").mkdir()
    with pytest.raises(UsageError, match=r"sweep\.csv is no table of fits"):
        read_rows(Path("sweep.csv"))


def _row(**different: str) -> Row:
    numbers = {
        "acc_original": "0.9667",
        "acc": "0.9111",
        "cr_paper": "0.393",
        "cr_file": "0.487",
        "difference": "-0.0556",
    }
    more = {"recon_rmse": "0.0123", "fit_seconds": "160000", "peak_memory_mib": "812"}
    return {"config": "cifar100_h680_teacher_progressive", "hidden": "680", **numbers, **more, **different}


def test_the_summary_shows_means_spreads_and_failures_whole(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [_row(), _row(acc="0.9333")]
    for columns in ("80", "60"):
        monkeypatch.setenv("COLUMNS", columns)
        print_summary(rows, {Fit("x/cifar100_h320.yaml", 64, 3): "it diverged"})
        shown = capsys.readouterr().out
        assert shown.startswith("test (original 96.67%)\n")
        for number in ("680", "39.3%", "48.7%", "92.22% ±1.57%", "-5.56%", "0.0123", "160000", "812", "failed", "64"):
            assert number in shown
        assert shown.endswith("failed: cifar100_h320, hidden 64, seed 3: it diverged\n")


def test_fits_of_different_originals_each_show_their_own(capsys: pytest.CaptureFixture[str]) -> None:
    print_summary([_row(), _row(config="other", acc_original="0.5")], {})
    title, head, _, *lines = capsys.readouterr().out.splitlines()
    assert title == "test"
    assert "original" in head
    assert any("96.67%" in line for line in lines)
    assert any("50.00%" in line for line in lines)
