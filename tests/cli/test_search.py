"""`nernlit search`: trials, how they end, and studies that several processes share."""

import json
import multiprocessing
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import optuna
import pytest
import torch
from optuna.trial import TrialState

from nernlit.callbacks import BestCheckpoint
from nernlit.cli import claims, search
from nernlit.cli.main import main
from nernlit.errors import DivergenceError, NernlitError, UsageError
from nernlit.storage.checkpoint import read_checkpoint
from nernlit.utilities.signals import Interrupted
from tests.fakes import QUICK

LR = "model.optimizer.lr=log(1e-5,1e-1)"
LINE = ["search", "-c", QUICK[1], "--space", LR, "--out", "found"]
Fit = Callable[[dict[str, str], Any], float]


def _study(name: str = "search") -> optuna.Study:
    return optuna.load_study(study_name=name, storage=f"sqlite:///found/{name}.db")


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> Callable[[Fit], list[dict[str, str]]]:
    """Replace fits by a function of their options and of the callback that reports; the options of each are kept."""

    def use(fit: Fit) -> list[dict[str, str]]:
        ran: list[dict[str, str]] = []

        def continued(options: Sequence[str], folder: Path, name: str, callbacks: Sequence[Any]) -> Any:
            ran.append(dict(option.partition("=")[::2] for option in options if option.startswith("--")))
            best = BestCheckpoint(monitor=ran[-1]["--best_checkpoint.monitor"])
            best.best_model_score = torch.tensor(fit(ran[-1], callbacks[0]))
            return SimpleNamespace(trainer=SimpleNamespace(checkpoint_callbacks=[best], log_dir=folder / name))

        monkeypatch.setattr(search, "continued_fit", continued)
        return ran

    return use


def test_a_search_finds_the_best_options_on_the_validation_images_and_goes_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tested: list[object] = []
    monkeypatch.setattr(L.Trainer, "test", lambda *_, **__: tested.append(0))
    width = "model.representation.predictor.hidden=int(4,12)"
    rest = [option for option in QUICK[2:] if "hidden" not in option and "devices" not in option]
    line = [*LINE, "--space", width, "model.loss=choice(rmse)", *rest]
    main([*line, "--trials", "1"])
    first = [trial.params for trial in _study().trials]
    main([*line, "--trials", "2"])
    trials = _study().trials
    assert [trial.params for trial in trials[:1]] == first
    assert len(trials) == 2
    best = _study().best_trial
    for trial in trials:
        assert trial.state == TrialState.COMPLETE
        assert 1e-5 <= trial.params["model.optimizer.lr"] <= 1e-1
        content = read_checkpoint(Path(trial.user_attrs["folder"]) / "checkpoints/best.ckpt")
        assert content["hyper_parameters"]["optimizer"]["init_args"]["lr"] == trial.params["model.optimizer.lr"]
        (state,) = (state for name, state in content["callbacks"].items() if name.startswith("BestCheckpoint"))
        assert trial.value == pytest.approx(float(state["best_model_score"]))
        assert trial.value <= best.value
        assert list(trial.intermediate_values) == [5, 10]
    shown = capsys.readouterr().out.splitlines()
    assert shown[-2] == f"folder of the best: {best.user_attrs['folder']}"
    program, *args = shlex.split(shown[-1])
    assert program == "nernlit"
    assert args[:3] == ["fit", "-c", QUICK[1]]
    assert args[-1] == "--model.loss=rmse"
    assert not tested


def test_a_trial_that_is_worse_than_the_median_is_ended_early(
    fits: Callable[[Fit], list[dict[str, str]]], capsys: pytest.CaptureFixture[str]
) -> None:
    figures = iter([0.9, 0.9, 0.9, 0.9, 0.9, 0.1, 0.95])

    def fit(options: dict[str, str], callback: search.Pruning) -> float:
        value = next(figures)
        for step in (10, 20):
            trainer = SimpleNamespace(
                sanity_checking=False, global_step=step, callback_metrics={"val/acc": torch.tensor(value)}
            )
            callback.on_validation_end(trainer, None)  # type: ignore[arg-type]
        return value

    ran = fits(fit)
    main([*LINE, "--trials", "7"])
    states = [trial.state.name for trial in _study().trials]
    assert states == ["COMPLETE"] * 5 + ["PRUNED", "COMPLETE"]
    assert list(_study().trials[5].intermediate_values) == [10]
    assert "trial 5: ended at step 10, worse than the median\n" in capsys.readouterr().out
    assert len(ran) == 7
    assert ran[0]["--best_checkpoint.mode"] == "max"


def test_a_trial_that_fails_is_reported_and_the_others_go_on(
    fits: Callable[[Fit], list[dict[str, str]]], capsys: pytest.CaptureFixture[str]
) -> None:
    def fit(options: dict[str, str], callback: search.Pruning) -> float:
        if len(ran) == 1:
            raise DivergenceError("the loss is nan")
        return 0.5

    ran = fits(fit)
    main([*LINE, "--trials", "2", "--monitor", "val/acc"])
    assert [trial.state.name for trial in _study().trials] == ["FAIL", "COMPLETE"]
    assert "nernlit: error: trial 0: the loss is nan\n" in capsys.readouterr().err
    ran.clear()
    with pytest.raises(NernlitError, match="no trial has finished with a value of the metric"):
        search.main([*LINE[1:], "--study", "other", "--trials", "1"])


def test_trials_of_equal_values_have_folders_of_their_own_and_values_that_cannot_be_are_one_trials_error(
    fits: Callable[[Fit], list[dict[str, str]]], capsys: pytest.CaptureFixture[str]
) -> None:
    def fit(options: dict[str, str], callback: search.Pruning) -> float:
        if len(ran) == 2:
            raise UsageError("these values do not fit each other")
        return 0.5

    ran = fits(fit)
    main(["search", "-c", QUICK[1], "--space", "model.loss=choice(rmse)", "--out", "found", "--trials", "3"])
    trials = _study().trials
    assert [trial.state.name for trial in trials] == ["COMPLETE", "FAIL", "COMPLETE"]
    assert "nernlit: error: trial 1: these values do not fit each other\n" in capsys.readouterr().err
    assert [Path(trial.user_attrs["folder"]).name for trial in (trials[0], trials[2])] == [
        "search-trial0",
        "search-trial2",
    ]


@pytest.mark.parametrize(
    "how",
    [
        "a signal",
        "another process died",
        "another machine died",
        "a process died before it claimed its trial",
        "a process died while it queued its trial again",
    ],
)
def test_an_interrupted_trial_is_run_again_with_its_values(
    how: str, fits: Callable[[Fit], list[dict[str, str]]]
) -> None:
    def fit(options: dict[str, str], callback: search.Pruning) -> float:
        if len(ran) == 1:
            callback.trial.report(0.25, 5)
            raise Interrupted(15)
        return 0.5

    ran = fits(fit)
    with pytest.raises(Interrupted) as ended:
        main([*LINE, "--trials", "2"])
    assert ended.value.message == "interrupted in trial 0; the same command continues it"
    if how != "a signal":  # its process could not even record that
        study = _study()
        left = study.ask({"model.optimizer.lr": optuna.distributions.FloatDistribution(1e-5, 1e-1, log=True)})
        if "queued" in how:
            study.enqueue_trial(left.params, user_attrs={"continues": left.number})
    if how in ("another process died", "another machine died"):
        host = claims._host() if how == "another process died" else "another"
        claim = Path("found/claim.search.1.1")
        claim.write_text(json.dumps({"host": host, "pid": 2**22 + 1, "started": 1}))
        if how == "another machine died":
            with pytest.raises(
                NernlitError, match="no trial has finished with a value of the metric"
            ):  # it may run still
                search.main([*LINE[1:], "--trials", "1"])
            old = time.time() - claims.STALE_SECONDS - 60
            os.utime(claim, (old, old))
    main([*LINE, "--trials", "2"])
    trials = _study().trials
    again = trials[-2]
    assert again.user_attrs["continues"] == len(trials) - 3
    assert again.params == trials[0].params
    assert again.intermediate_values == ({5: 0.25} if how == "a signal" else {})
    assert [trial.state for trial in trials[-2:]] == [TrialState.COMPLETE] * 2
    assert ran[0] == ran[1]  # the folder of a fit follows from its options: it goes on from its checkpoint
    assert not list(Path("found").glob("claim.*"))


def test_processes_share_the_trials_of_a_study(fits: Callable[[Fit], list[dict[str, str]]]) -> None:
    def fit(options: dict[str, str], callback: search.Pruning) -> float:
        time.sleep(0.05)
        return float(options["--model.optimizer.lr"])

    fits(fit)
    processes = multiprocessing.get_context("fork")
    started = [processes.Process(target=main, args=([*LINE, "--trials", "9"],)) for _ in range(3)]
    for process in started:
        process.start()
    for process in started:
        process.join()
    assert [process.exitcode for process in started] == [0, 0, 0]
    trials = _study().trials
    assert {trial.state for trial in trials} == {TrialState.COMPLETE}
    assert len(trials) == 9
    assert all(trial.value == pytest.approx(trial.params["model.optimizer.lr"]) for trial in trials)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--space", "lr"], "argument --space: lr; expected OPTION=log(LOW,HIGH), OPTION=uniform(LOW,HIGH)"),
        (["--space", "lr=log(0,1)"], "argument --space: lr=log(0,1); expected"),
        (["--space", "lr=uniform(2,1)"], "argument --space: lr=uniform(2,1); expected"),
        (["--space", "lr=uniform(1,nan)"], "argument --space: lr=uniform(1,nan); expected"),
        (["--space", "n=int(1.5,3)"], "argument --space: n=int(1.5,3); expected"),
        (["--space", "n=int(1)"], "argument --space: n=int(1); expected"),
        (["--space", "n=choice(a,a)"], "argument --space: n=choice(a,a); expected"),
        (["--monitor", "test/acc"], "argument --monitor: invalid choice: 'test/acc'"),
        (["--trials", "0"], "argument --trials: 0; expected an integer of at least 1"),
        (["--study", "a/b"], "--study a/b: expected letters, digits, '_', '-' and '.'"),
        (["--model.optimizer.lr=1"], "this command sets --model.optimizer.lr; its values are those of --space"),
        (["--model.optimizer.init_args.lr=1"], "this command sets --model.optimizer.lr; its values are those of"),
        (["--space", "model.optimizer.lr=log(1,2)"], "--space: an option is given twice"),
        (["--trainer.devices", "2"], "this command sets --trainer.devices; a trial runs on one device; leave it out"),
        (["--space", "trainer.devices=choice(2)"], "--space: this command sets --trainer.devices; a trial runs on"),
        (
            ["--space", "best_checkpoint.init_args.mode=choice(min)"],
            "--space: this command sets --best_checkpoint.mode",
        ),
        (["--storage", "nowhere"], "--storage nowhere: "),
        (["--storage", "sqlite:///no/where.db"], "--storage sqlite:///no/where.db: "),
        (["--storage", "journal:no/where"], "--storage journal:no/where: "),
        (["--space", "model.optimizr=log(1,2)"], "optimizr"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_options_are_one_message(args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*LINE, *QUICK[2:9], "--trials", "2", *args])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("nernlit: error: ")
    assert message in said
    assert "Traceback" not in said


def test_a_fit_without_the_figure_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    best = BestCheckpoint(monitor="val/recon_rmse")  # as with `data: null`
    trainer = SimpleNamespace(checkpoint_callbacks=[best])
    monkeypatch.setattr(search, "continued_fit", lambda *_, **__: SimpleNamespace(trainer=trainer))
    with pytest.raises(UsageError, match="--monitor val/acc: the fit logs no such metric; enable validation, or pass"):
        search.main([*LINE[1:], "--trials", "1"])


def test_a_study_keeps_its_options(fits: Callable[[Fit], list[dict[str, str]]]) -> None:
    fits(lambda *_: 0.5)
    line = [*LINE[1:], "--storage", "journal:trials.log", "--trials", "1"]
    search.main(line)
    search.main(line)
    for other, names in ((["--data.seed=1"], "options of fit"), (["--space", "n=int(1,2)"], "--space")):
        with pytest.raises(UsageError, match=rf"--study search was begun with other options \({names}\); pass another"):
            search.main([*line, *other])
    with pytest.raises(UsageError, match="with other options"):
        search.main([*line, "--monitor", "val/recon_rmse"])


def test_without_optuna_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in [name for name in sys.modules if name.startswith(("optuna", "nernlit.cli.search"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(SystemExit):
        main([*LINE, "--trials", "1"])
    assert capsys.readouterr().err == (
        "nernlit: error: `nernlit search` needs the Python package optuna; install it: pip install 'nernlit[optuna]'.\n"
    )


def test_options_that_were_refused_do_not_bind_a_study(fits: Callable[[Fit], list[dict[str, str]]]) -> None:
    def refuse(options: dict[str, str], *_: object) -> float:
        if "--trainer.max_epoch" in options:
            raise UsageError("there is no option --trainer.max_epoch")
        return 0.5

    ran = fits(refuse)
    line = [*LINE[1:], "--storage", "journal:trials.log", "--trials", "1"]
    for _ in range(2):
        with pytest.raises(UsageError, match="there is no option"):
            search.main([*line, "--trainer.max_epoch=2"])
    search.main([*line, "--trainer.max_epochs=2"])
    assert len(ran) == 3
    with pytest.raises(UsageError, match="with other options"):
        search.main([*line, "--trainer.max_epoch=2"])
