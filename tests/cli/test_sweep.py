"""`nernlit sweep`: what it says, and how it ends where fits, options or its table are wrong."""

import csv
import json
import multiprocessing
import re
import shlex
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

import nernlit
from nernlit.callbacks import LearningRate
from nernlit.cli import claims, sweep_results, sweep_run
from nernlit.cli.claims import claim
from nernlit.cli.main import main
from nernlit.cli.runs import Run
from nernlit.cli.sweep import main as sweep
from nernlit.cli.sweep_plan import Fit, Sweep
from nernlit.cli.sweep_results import comparable, read_results, tabulate, write_result
from nernlit.cli.sweep_table import COLUMNS, KEYS, Row, print_summary, read_rows
from nernlit.errors import NernlitError, UsageError
from nernlit.storage.files import write_table
from tests.fakes import CONFIGS, QUICK, digits_representation

REST = QUICK[2:]


def _config(name: str, more: str = "") -> str:
    """A configuration of the working directory that builds on the digits' one."""
    Path(name).write_text(f"base: [{Path(QUICK[1]).resolve()}]\n{more}")
    return name


def _rows() -> list[dict[str, str]]:
    with Path("swept/sweep.csv").open() as file:
        return list(csv.DictReader(file))


def measured(**different: float | str) -> Row:
    """What a fit measured, without its key and folder."""
    return {**{name: 0.5 for name in COLUMNS if name not in (*KEYS, "folder", "hidden")}, "hidden": "8", **different}


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
    outcomes: list[Any] = [
        measured(hidden="8", peak_memory_mib=1),
        RuntimeError("no\nmemory"),
        KeyboardInterrupt(),
    ]

    def fit(*arguments: Any) -> Row:
        outcome = outcomes.pop(0)
        if isinstance(outcome, BaseException):
            raise outcome
        return dict(outcome)

    monkeypatch.setattr(sweep_run, "fit_and_test", fit)
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


def test_widths_of_quantized_predictors_are_not_averaged(capsys: pytest.CaptureFixture[str]) -> None:
    rest = [option for option in REST if "hidden" not in option]
    options = ["--hidden", "4", "12", "--out", "swept", *rest, "--model.representation.quantize.bits=6"]
    sweep(["--configs", QUICK[1], *options])
    assert [row["hidden"] for row in _rows()] == ["4", "12"]
    summary = [line.split()[:2] for line in capsys.readouterr().out.splitlines() if line.startswith("digits_h96 ")]
    assert summary[-2:] == [["digits_h96", "4"], ["digits_h96", "12"]]


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


def test_every_fit_is_in_one_shard(capsys: pytest.CaptureFixture[str]) -> None:
    line = ["--configs", QUICK[1], "--seeds", "0", "1", "2", "3", "4", "--out", "swept", "--dry-run"]
    sweep(line)
    whole = capsys.readouterr().out.splitlines()
    assert len(whole) == 5
    for shards in (1, 2, 3, 5):
        shares = []
        for number in range(1, shards + 1):
            sweep([*line, f"--shard={number}/{shards}"])
            shares.append(capsys.readouterr().out.splitlines())
        assert sorted(command for share in shares for command in share) == sorted(whole)
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
    sweep([*line, "--shard", "6/6"])
    shown = capsys.readouterr().out
    assert shown == "--shard 6/6: there are fewer fits than shards; this shard has none\n"


def test_the_table_lists_the_fits_of_all_shards(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["--configs", QUICK[1], "--seeds", "0", "1", "2", "--out", "swept"]
    monkeypatch.setattr(sweep_run, "fit_and_test", lambda _, fit: measured(acc=fit.seed / 10))
    sweep([*line, "--shard", "2/2"])
    Path("swept/sweep.csv").unlink()  # it is written from the folders
    sweep([*line, "--shard", "1/2"])
    assert [(row["seed"], row["acc"]) for row in _rows()] == [("1", "0.1"), ("0", "0.0"), ("2", "0.2")]
    assert all(Path(row["folder"], "test.json").is_file() for row in _rows())
    assert "10.00% ±10.00%" in capsys.readouterr().out  # the mean of all three
    Path("swept").rename("moved")
    sweep([*line, "--out", "moved"])
    assert "3 of 3 fits are in moved/sweep.csv already" in capsys.readouterr().out


def test_a_result_that_arrives_while_the_table_is_written_is_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    row = {**dict.fromkeys(KEYS, "1"), **measured()}
    write_result(Path("swept/a/version_1"), row)

    def write(path: Path, rows: Sequence[Row]) -> None:
        write_table(path, rows)
        if len(rows) == 1:
            write_result(Path("swept/b/version_1"), row)  # another process, which wrote its table a moment earlier

    monkeypatch.setattr(sweep_results, "write_table", write)
    assert len(tabulate(Sweep(Path("swept"), "best", []))) == 2
    assert [row["folder"] for row in _rows()] == ["swept/a/version_1", "swept/b/version_1"]


def test_sweeps_into_one_folder_share_the_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds = [str(seed) for seed in range(12)]
    dead = Path("swept/digits_h96_seed0") / f"claim.{_folder(0).name}.1"
    dead.parent.mkdir(parents=True)
    dead.write_text(json.dumps({"host": claims._host(), "pid": 2**22 + 1, "started": 1}))  # above all process numbers

    def fit(_: Sweep, fit: Fit) -> Row:
        with Path("ran").open("a") as file:
            file.write(f"{fit.seed}\n")
        time.sleep(0.05)
        return measured()

    monkeypatch.setattr(sweep_run, "fit_and_test", fit)
    processes = multiprocessing.get_context("fork")
    line = ["--configs", QUICK[1], "--seeds", *seeds, "--out", "swept"]
    started = [processes.Process(target=sweep, args=(line,)) for _ in range(3)]
    for process in started:
        process.start()
    for process in started:
        process.join()
    assert [process.exitcode for process in started] == [0, 0, 0]
    assert sorted(Path("ran").read_text().split(), key=int) == seeds
    assert sorted((row["seed"] for row in _rows()), key=int) == seeds
    assert not list(Path("swept").rglob("claim.*"))


def test_a_fit_that_another_process_runs_is_left_to_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sweep_run, "fit_and_test", lambda *_: measured())
    with claim(_folder(1)):
        sweep(["--configs", QUICK[1], "--seeds", "0", "1", "--out", "swept"])
    assert [row["seed"] for row in _rows()] == ["0"]
    assert "1 of 2 fits are running in other processes: digits_h96, seed 1\n" in capsys.readouterr().out


def _folder(seed: int) -> Path:
    return Sweep(Path("swept"), "best", []).folder(Fit(QUICK[1], None, seed))


def test_an_interrupted_fit_goes_on_from_its_last_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    line = ["--configs", QUICK[1], "--out", "whole", *REST]
    sweep(line)
    line[3] = "swept"
    steps: list[int] = []
    before = LearningRate.on_train_batch_start

    def stop(self: LearningRate, trainer: L.Trainer, *others: Any) -> None:
        if not steps and trainer.global_step == 7:
            raise ConnectionAbortedError("power cut")
        before(self, trainer, *others)

    monkeypatch.setattr(LearningRate, "on_train_batch_start", stop)
    with pytest.raises(NernlitError, match="1 of 1 fits failed"):
        sweep(line)
    monkeypatch.setattr(LearningRate, "on_train_batch_start", lambda _, trainer, *__: steps.append(trainer.global_step))
    sweep(line)
    assert steps == [5, 6, 7, 8, 9]
    whole, resumed = (
        {name: value for name, value in row.items() if name not in ("fit_seconds", "steps_per_second", "folder")}
        for row in (*read_results(Path("whole")), *read_results(Path("swept")))
    )
    del whole["peak_memory_mib"], resumed["peak_memory_mib"]
    assert whole == resumed


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--seed", "3"], "--seed"),
        (["--hid", "4"], "--hid"),
        (
            ["--shard", "0/2"],
            "argument --shard: 0/2; expected K/N, where N is the number of shares and K one of 1 to N",
        ),
        (["--shard", "3/2"], "argument --shard: 3/2; expected K/N"),
        (["--shard", "1of2"], "argument --shard: 1of2; expected K/N"),
        (
            ["--trainer.logger.version=x"],
            "this command sets --trainer.logger.version; its fits are told apart",
        ),
        (["--jobs", "0"], "argument --jobs: 0; expected an integer of at least 1"),
        (["--jobs", "2", "--dry-run"], "--jobs 2 and --dry-run: a dry run starts no fits; leave one of them out"),
        (["--dry"], "there is no option --dry; did you mean --dry-run?"),
        (["--hidden", "0"], "argument --hidden: 0; expected an integer of at least 1"),
        (["--seeds", "-1"], "argument --seeds: -1; expected an integer of at least 0"),
        (["--select", "first"], "argument --select: invalid choice: 'first'"),
        (["--out", "file"], "--out file: file is a file; expected a folder"),
        (["--out", "file/swept"], "--out file/swept: file is a file"),
        (["--configs", "nowhere.yaml"], r"no configuration file nowhere\.yaml"),
        (["--configs", "digits_h69"], r"no configuration file digits_h69 \(did you mean digits_h96"),
        (["--configs", "a/x.yaml", "b/x.yaml"], "2 files are named x; rename them"),
        (["--seed_everything", "3"], "this command sets --seed_everything; pass --seeds"),
        (["--ckpt_path=last"], "--ckpt_path=last: this command sets --ckpt_path; each fit resumes"),
        (["--trainer.logger.init_args.save_dir=x"], "this command sets --trainer.logger.save_dir; pass --out"),
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


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--data", "null"], "a sweep compares accuracies, and there are no images"),
        (["--trainer.limit_test_batches=1"], "--trainer.limit_test_batches 1: a sweep tests on all images"),
        (["--best_checkpoint.save_top_k=0"], "the fit would write no checkpoints/best.ckpt in its folder"),
        (["--best_checkpoint.dirpath=other"], "the fit would write no checkpoints/best.ckpt in its folder"),
        (["--configs", "digits_original"], "OriginalModule does not train a representation"),
    ],
)
def test_a_fit_that_could_not_be_tested_is_refused_before_it_begins(
    args: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    configs = [] if "--configs" in args else ["--configs", QUICK[1]]
    with pytest.raises(SystemExit):
        main(["sweep", *configs, *args, "--threads=1"])
    assert message in capsys.readouterr().err
    assert not list(Path().rglob("*.ckpt"))


def _comparable_row(**different: str) -> Row:
    keys = {"config": "a", "seed": "0", "select": "best", "settings": "", "asked_hidden": "", "files": "new"}
    return {**keys, "hidden": "96", **different}


def test_rows_are_of_the_files_that_the_sweep_reads_also_if_others_are_newer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nernlit.cli.sweep_plan.config_fingerprint", lambda options: "old")
    rows = [_comparable_row(files="old"), _comparable_row(files="new"), _comparable_row(config="b", files="new")]
    swept = Sweep(Path("out"), "best", [])
    assert comparable(rows, swept) == rows[1:]
    swept.key(Fit("a.yaml", None, 0))
    assert comparable(rows, swept) == [rows[0], rows[2]]


def test_a_width_that_is_the_configurations_own_counts_once() -> None:
    rows = [_comparable_row(), _comparable_row(asked_hidden="96"), _comparable_row(hidden="64", asked_hidden="64")]
    assert comparable(rows, Sweep(Path("out"), "best", [])) == [rows[2], rows[1]]


def test_a_configuration_that_is_given_twice_is_fitted_once(capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(CONFIGS / "digits_h96.yaml", "a.yaml")
    Path("a.yaml").write_text(Path("a.yaml").read_text().replace("base/", f"{CONFIGS}/base/"))
    sweep(["--configs", "a.yaml", "./a.yaml", "--dry-run"])
    assert len(capsys.readouterr().out.splitlines()) == 1
