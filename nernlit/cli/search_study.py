"""The study of `nernlit search`: its space and its storage, and which of its trials are still to be run."""

import argparse
import math
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Literal

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState

from nernlit.cli.claims import is_claimed, remove_claims
from nernlit.errors import UsageError

#: Attribute of a trial whose options were refused, probably those of every trial.
REFUSED = "refused"
#: What `dimension` reads.
SPACE = "OPTION=log(LOW,HIGH), OPTION=uniform(LOW,HIGH), OPTION=int(LOW,HIGH) or OPTION=choice(A,B,...)"


def dimension(text: str) -> tuple[str, BaseDistribution]:
    """The name of an option and where its values lie, from a text such as `model.optimizer.lr=log(1e-4,1e-1)`."""
    found = re.fullmatch(r"(?:--)?([a-z][\w.]*)=(log|uniform|int|choice)\((.+)\)", text)
    try:
        if found is None:
            raise ValueError
        name, kind, inside = found.groups()
        parts = [part.strip() for part in inside.split(",")]
        if kind == "choice":
            if "" in parts or len(set(parts)) < len(parts):
                raise ValueError
            return name, CategoricalDistribution(parts)
        low, high = (int if kind == "int" else float)(parts[0]), (int if kind == "int" else float)(parts[1])
        if len(parts) > 2 or not -math.inf < low < high < math.inf or (kind == "log" and low <= 0):
            raise ValueError
        if kind == "int":
            return name, IntDistribution(int(low), int(high))
        return name, FloatDistribution(low, high, log=kind == "log")
    except (ValueError, IndexError):
        raise argparse.ArgumentTypeError(f"{text}; expected {SPACE}, with LOW below HIGH") from None


def open_study(url: str, name: str, direction: Literal["minimize", "maximize"], own: Mapping[str, str]) -> optuna.Study:
    """Create a study, or open the one of that name.

    Args:
        url: Where its trials are stored.
        name: Its name.
        direction: `maximize` or `minimize` the figure.
        own: The options that all its trials have.

    Raises:
        UsageError: If the storage cannot be opened, or the study was begun with other options.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        pruner = optuna.pruners.MedianPruner()
        study = optuna.create_study(
            storage=_storage(url), study_name=name, direction=direction, pruner=pruner, load_if_exists=True
        )
    except Exception as error:  # of optuna, of SQLAlchemy or of the driver of a database
        reason = " ".join(str(error).split())
        raise UsageError(
            f"--storage {url}: {reason}; expected sqlite:///FILE, journal:FILE or a database URL."
        ) from error
    before = study.user_attrs.get("options", own)
    if all(trial.user_attrs.get(REFUSED) for trial in study.get_trials(deepcopy=False)):
        before = own  # no trial has run with the options before
    if different := [key for key in own if before.get(key) != own[key]]:
        raise UsageError(f"--study {name} was begun with other options ({', '.join(different)}); pass another name.")
    study.set_user_attr("options", dict(own))
    return study


def _storage(url: str) -> BaseStorage:
    if url.startswith("journal:"):
        backend = JournalFileBackend(url.removeprefix("journal:"))
        return JournalStorage(backend)
    # Seconds to wait for another process that writes.
    patience = {"connect_args": {"timeout": 60}} if url.startswith("sqlite:") else {}
    return RDBStorage(url, engine_kwargs=patience)


def trial_claim_path(study: optuna.Study, trial: Trial | FrozenTrial, out: Path) -> Path:
    """What a process claims while it runs a trial."""
    return out / f"{study.study_name}.{trial.number}"


def is_unfinished(study: optuna.Study, trials: int, out: Path) -> bool:
    """Whether there is a trial to run; those of processes that have ended are queued again first.

    The caller holds the claim under which trials are created and claimed: a running trial without a claim has no
    process.
    """
    running = study.get_trials(states=(TrialState.RUNNING,))
    left = {trial.number for trial in running if not is_claimed(trial_claim_path(study, trial, out))}
    # Read again: a process removes its claim after it has recorded how its trial ended.
    for trial in study.get_trials(states=(TrialState.RUNNING,)):
        if trial.number in left:
            queue_again(study, trial)
            remove_claims(trial_claim_path(study, trial, out))
    every = study.get_trials(deepcopy=False)
    replaced = {trial.user_attrs.get("continues") for trial in every}
    begun = [
        trial
        for trial in every
        if trial.number not in replaced and trial.state != TrialState.WAITING and not trial.user_attrs.get(REFUSED)
    ]
    return len(begun) < trials


def queue_again(study: optuna.Study, trial: Trial | FrozenTrial) -> None:
    """Let an interrupted trial be run again, by a trial with the same values that continues it.

    In this order a process that is killed in between loses no trial.
    """
    if not any(other.user_attrs.get("continues") == trial.number for other in study.get_trials(deepcopy=False)):
        study.enqueue_trial(trial.params, user_attrs={"continues": trial.number})
    with suppress(ValueError):  # another process has done this
        study.tell(trial.number, state=TrialState.FAIL)


def first_number(study: optuna.Study, trial: Trial) -> int:
    """The number of the trial that this one is, or continues, perhaps after others."""
    every, number = study.get_trials(deepcopy=False), trial.number
    while (continued := every[number].user_attrs.get("continues")) is not None:
        number = continued
    return number


def earlier_figures(study: optuna.Study, trial: Trial) -> dict[int, float]:
    """The validation figures of the interrupted trial that a trial continues."""
    continued = trial.user_attrs.get("continues")
    return {} if continued is None else study.get_trials(deepcopy=False)[continued].intermediate_values
