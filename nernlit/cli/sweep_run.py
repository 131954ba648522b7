"""Running the fits of a sweep one after the other."""

import statistics
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import final

from nernlit.cli.claims import claim, remove_claims
from nernlit.cli.main import ERROR, run, user_message
from nernlit.cli.sweep_fit import Testable, forget_peak_memory, measure
from nernlit.cli.sweep_plan import Fit, Sweep
from nernlit.cli.sweep_results import is_finished, tabulate, write_result
from nernlit.cli.sweep_table import Row
from nernlit.utilities.progress import duration
from nernlit.utilities.signals import Interrupted


@final
@dataclass
class Outcome:
    """How many fits of a sweep ended, and how.

    Attributes:
        total: The number of all fits.
        jobs: The number of fits that run at the same time.
        finished: The number of finished ones.
        seconds: How long some of these took.
        failed: Those that failed, and why.
        claimed_by_others: Those that other processes run.
    """

    total: int
    jobs: int
    finished: int
    seconds: list[float]
    failed: dict[Fit, str] = field(default_factory=dict)
    claimed_by_others: list[Fit] = field(default_factory=list)

    def print_start(self, fit: Fit, running: int = 0) -> None:
        """Print that a fit begins, and how long all that have not ended will take; `running` others are running."""
        ended = self.finished + len(self.failed) + len(self.claimed_by_others)
        left = statistics.fmean(self.seconds) * (self.total - ended) / self.jobs if self.seconds else None
        estimate = "" if left is None else f", about {duration(left)} left"
        print(f"fit {ended + running + 1} of {self.total}{estimate}: {fit.name}", flush=True)

    def fail(self, fit: Fit, message: str) -> None:
        """Report a fit that failed."""
        self.failed[fit] = message
        print(f"{ERROR}{fit.name}: {message}", file=sys.stderr, flush=True)


def run_in_turn(sweep: Sweep, waiting: Sequence[Fit], outcome: Outcome) -> None:
    """Run fits in this process, except those that other processes run.

    Raises:
        Interrupted: If a signal ended a fit.
        UsageError: If the command line has an option that no fit has.
    """
    for fit in waiting:
        folder = sweep.folder(fit)
        with claim(folder) as is_ours:
            if not is_ours:
                outcome.claimed_by_others.append(fit)
                continue
            if is_finished(folder):  # by another process, since this one began
                outcome.finished += 1
                continue
            outcome.print_start(fit)
            began = time.monotonic()
            try:
                write_result(folder, {**sweep.key(fit), **fit_and_test(sweep, fit)})
                remove_claims(folder)
            except Interrupted as interrupted:
                interrupted.message = (
                    f"interrupted in {fit.name}; {outcome.finished} of {outcome.total} fits are in {sweep.table}, "
                    "and the same command continues with the others"
                )
                raise
            except Exception as error:
                if is_unknown_option(error):
                    raise
                outcome.fail(fit, described(error))
                continue
        outcome.seconds.append(time.monotonic() - began)
        outcome.finished += 1
        tabulate(sweep)


def fit_and_test(sweep: Sweep, fit: Fit) -> Row:
    """Run a fit, and test it."""
    forget_peak_memory()
    return measure(run(["fit", *sweep.options(fit)], [Testable(sweep.select)]), sweep.select)


def is_unknown_option(error: Exception) -> bool:
    """Whether the command line has an option that no fit has; a class of one configuration may lack one, too."""
    text = str(error.__cause__)  # the parser's own message
    return "unrecognized arguments" in text and "Parser key" not in text


def described(error: Exception) -> str:
    """An error in one line; one that no user can fix shows its traceback too."""
    message = user_message(error)
    if message is None:
        traceback.print_exception(error)
        message = f"{type(error).__name__}: {error}"
    return " ".join(message.split())
