"""`nernlit search`: hyperparameter search with optuna for the best validation metric.

Each trial is a fit; a fit that is worse than the median of earlier trials is stopped early (pruned). Trials are kept in
a storage that several processes can share. The same command continues a study, and an interrupted trial continues from
its last checkpoint. Test images are not used.
"""

import argparse
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal, final

import lightning as L
import optuna
from lightning.pytorch.callbacks import Callback
from optuna.trial import TrialState
from sqlalchemy import URL

from nernlit.callbacks import BestCheckpoint
from nernlit.cli.arguments import CommandParser, count, path, refuse_own_options, require_writable, without_init_args
from nernlit.cli.claims import awaited_claim, claim, remove_claims
from nernlit.cli.configs import config_fingerprint
from nernlit.cli.fits import continued_fit
from nernlit.cli.main import ERROR, GLOBAL_OPTIONS
from nernlit.cli.search_study import (
    REFUSED,
    SPACE,
    dimension,
    earlier_figures,
    first_number,
    is_unfinished,
    open_study,
    queue_again,
    trial_claim_path,
)
from nernlit.cli.sweep_run import described
from nernlit.errors import NernlitError, UsageError
from nernlit.utilities.signals import Interrupted
from nernlit.utilities.tables import print_table

#: Validation figure -> whether larger values are better.
_MONITORS = {"val/acc": "max", "val/recon_rmse": "min"}
#: Options of `fit` that a search sets -> what to do instead.
_OWN_OPTIONS = {
    **dict.fromkeys(("--trainer.devices", "--trainer.num_nodes"), "a trial runs on one device; leave it out"),
    "--best_checkpoint.monitor": "pass --monitor",
    "--best_checkpoint.mode": "it follows from --monitor; leave it out",
}
_SHOWN_TRIALS = 5


@final
class Pruning(Callback):
    """Report each validation of a fit to its trial, and end the fit if the trial is worse than the median.

    Args:
        trial: The trial.
        monitor: Name of the metric.
    """

    def __init__(self, trial: optuna.Trial, monitor: str) -> None:
        self.trial, self.monitor = trial, monitor

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking or self.monitor not in trainer.callback_metrics:
            return
        self.trial.report(float(trainer.callback_metrics[self.monitor]), trainer.global_step)
        if self.trial.should_prune():
            raise optuna.TrialPruned(f"at step {trainer.global_step}")


def main(args: Sequence[str]) -> None:
    """Run the command with these arguments; those it does not know go to `fit` as they are.

    Raises:
        NernlitError: If no trial gave a figure.
        UsageError: If the options cannot work.
    """
    parser = CommandParser("search", __doc__, "All other options are those of `nernlit fit`.")
    parser.add_argument("--space", type=dimension, nargs="+", action="extend", required=True, help=SPACE)
    parser.add_argument("--trials", type=count, required=True, help="number of trials, of all processes together")
    parser.add_argument("--study", default="search", help="name of the study (default: search)")
    parser.add_argument("--storage", help="sqlite:///FILE, journal:FILE, ... (default: OUT/STUDY.db, an SQLite file)")
    parser.add_argument("--monitor", choices=_MONITORS, default="val/acc", help="validation figure (default: val/acc)")
    parser.add_argument("--out", type=path, default=Path("runs/search"), help="folder of the fits")
    options, fit_args = parser.parse_known_args(args)
    space = dict(options.space)
    if len(space) < len(options.space):
        raise UsageError("--space: an option is given twice; give each option once.")
    spanned = {without_init_args(f"--{name}"): "its values are those of --space; leave it out" for name in space}
    for name in spanned.keys() & _OWN_OPTIONS.keys():
        raise UsageError(f"--space: this command sets {name}; {_OWN_OPTIONS[name]}.")
    refuse_own_options(spanned | _OWN_OPTIONS, fit_args)
    if not re.fullmatch(r"\w[\w.-]*", options.study):
        raise UsageError(f"--study {options.study}: expected letters, digits, '_', '-' and '.': it names folders.")
    require_writable(options.out, "--out")
    options.out.mkdir(parents=True, exist_ok=True)
    own = {
        "--space": str(sorted(space.items())),
        "--monitor": options.monitor,
        "options of fit": shlex.join(fit_args),
        "contents of configurations": config_fingerprint(fit_args),
    }
    database = str(options.out / f"{options.study}.db")
    url = options.storage or URL.create("sqlite", database=database).render_as_string(hide_password=False)
    direction: Literal["minimize", "maximize"] = "maximize" if _MONITORS[options.monitor] == "max" else "minimize"
    one_at_a_time = options.out / f"{options.study}.storage"
    with awaited_claim(one_at_a_time):  # optuna creates its tables without a lock
        study = open_study(url, options.study, direction, own)
    while True:
        with ExitStack() as held:
            with awaited_claim(one_at_a_time):
                if not is_unfinished(study, options.trials, options.out):
                    break
                trial = study.ask(space)
                place = trial_claim_path(study, trial, options.out)
                held.enter_context(claim(place))
            _run(study, trial, options, fit_args)
            remove_claims(place)
    _show(study, options.monitor, fit_args)


def _run(study: optuna.Study, trial: optuna.Trial, options: argparse.Namespace, fit_args: Sequence[str]) -> None:
    """Run the fit of a trial, and record how it ended."""
    monitor = options.monitor
    print(f"trial {trial.number}: {_shown(trial.params)}", flush=True)
    for step, value in earlier_figures(study, trial).items():
        trial.report(value, step)
    try:
        fit = ["fit", *fit_args, *_own_options(monitor), *_as_options(trial.params)]
        # Not of the values alone: two processes may draw the same ones.
        name = f"{options.study}-trial{first_number(study, trial)}"
        cli = continued_fit(fit, options.out, name, callbacks=[Pruning(trial, monitor)])
        (best,) = (each for each in cli.trainer.checkpoint_callbacks if isinstance(each, BestCheckpoint))
        if best.monitor != monitor or best.best_model_score is None:
            raise UsageError(
                f"--monitor {monitor}: the fit logs no such metric; enable validation, or pass another metric."
            )
        trial.set_user_attr("folder", str(cli.trainer.log_dir))
        value = float(best.best_model_score)
    except optuna.TrialPruned as pruned:
        study.tell(trial, state=TrialState.PRUNED)
        print(f"trial {trial.number}: ended {pruned}, worse than the median", flush=True)
    except Interrupted as interrupted:
        queue_again(study, trial)
        interrupted.message = f"interrupted in trial {trial.number}; the same command continues it"
        raise
    except Exception as error:
        others = (TrialState.COMPLETE, TrialState.PRUNED)
        # Probably of every trial, such as an option that does not exist.
        refused = isinstance(error, UsageError) and not study.get_trials(deepcopy=False, states=others)
        trial.set_user_attr(REFUSED, refused)
        study.tell(trial, state=TrialState.FAIL)
        if refused:
            raise
        print(f"{ERROR}trial {trial.number}: {described(error)}", file=sys.stderr, flush=True)
    else:
        study.tell(trial, value)
        print(f"trial {trial.number}: {monitor} {value:.5g}", flush=True)


def _own_options(monitor: str) -> list[str]:
    """The options that every trial has."""
    return [
        "--trainer.devices=1",
        f"--best_checkpoint.monitor={monitor}",
        f"--best_checkpoint.mode={_MONITORS[monitor]}",
    ]


def _as_options(params: Mapping[str, Any]) -> list[str]:
    return [f"--{name}={value}" for name, value in params.items()]


def _shown(params: Mapping[str, Any]) -> str:
    return " ".join(
        f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}" for name, value in params.items()
    )


def _show(study: optuna.Study, monitor: str, fit_args: Sequence[str]) -> None:
    """Print the best trials, and the command that repeats the best one."""
    finished = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if not finished:
        raise NernlitError(
            "no trial has finished with a value of the metric, and failed ones are not run again; pass a larger "
            "--trials, or another --study."
        )
    finished.sort(key=lambda trial: trial.values[0], reverse=_MONITORS[monitor] == "max")
    rows = [[_shown(trial.params), str(trial.number), f"{trial.values[0]:.5g}"] for trial in finished[:_SHOWN_TRIALS]]
    print_table(f"best of {len(study.trials)} trials", ["options", "trial", monitor], rows)
    best = finished[0]
    print(f"folder of the best: {best.user_attrs['folder']}")
    options = [*fit_args, *_own_options(monitor), *_as_options(best.params), *GLOBAL_OPTIONS.get()]
    print(shlex.join(["nernlit", "fit", *options]))
