"""`nernlit sweep`: fit configurations at several hidden widths and seeds, test each, and tabulate.

A finished fit is not run again, and an interrupted one continues from its last checkpoint, so that the same command
continues a sweep. Two fits are the same if their options and the contents of their configuration files are. If a fit
fails, the others still run. Each fit uses one device. Several processes, on one machine or on several that share the
folder, can work on one sweep: each takes a share (`--shard`), or the fits that no other process runs. To start from a
.nern file: `--model.init_from FILE.nern --model.representation null`.
"""

import itertools
import re
import shlex
import sys
from argparse import ArgumentTypeError
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from nernlit.analysis import tradeoff_figure, width_figure
from nernlit.cli.arguments import CommandParser, count, path, refuse_own_options, require_writable, seed
from nernlit.cli.configs import find_config
from nernlit.cli.main import GLOBAL_OPTIONS
from nernlit.cli.sweep_jobs import run_side_by_side
from nernlit.cli.sweep_plan import Fit, Sweep
from nernlit.cli.sweep_results import comparable, is_finished, read_results, tabulate
from nernlit.cli.sweep_run import Outcome, run_in_turn
from nernlit.cli.sweep_table import Row, common_original, print_summary, read_rows
from nernlit.errors import NernlitError, UsageError
from nernlit.storage.files import write_figure

#: Options of `fit` that a sweep sets -> what to do instead.
_OWN_OPTIONS = {
    "--seed_everything": "pass --seeds",
    "--ckpt_path": "each fit resumes from its own checkpoint if there is one",
    "--trainer.logger.save_dir": "pass --out",
    "--trainer.logger.name": "its fits are named after their configurations",
    "--trainer.logger.version": "its fits are told apart by their options",
}


def main(args: Sequence[str]) -> None:
    """Run the command with these arguments; those it does not know go to `fit` as they are.

    Raises:
        NernlitError: At the end, if fits failed.
        UsageError: At once, if the options cannot work.
    """
    options, fit_args = _parser().parse_known_args(args)
    _refuse_options(fit_args, options.hidden is not None, [f"--{name.replace('_', '-')}" for name in vars(options)])
    if options.dry_run and options.jobs > 1:
        raise UsageError(f"--jobs {options.jobs} and --dry-run: a dry run starts no fits; leave one of them out.")
    _require_distinct_names(options.configs)
    configs = {find_config(name).resolve(): name for name in options.configs}.values()  # each file once
    require_writable(options.out, "--out")
    fits = list(dict.fromkeys(map(Fit._make, itertools.product(configs, options.hidden or [None], options.seeds))))
    sweep = Sweep(options.out, options.select, fit_args)
    if options.shard is not None:
        first, shards = options.shard
        fits = fits[first - 1 :: shards]
        if not fits:
            print(f"--shard {first}/{shards}: there are fewer fits than shards; this shard has none")
    waiting = [fit for fit in fits if not is_finished(sweep.folder(fit))]  # reads every configuration
    read_rows(sweep.table)  # another file of that name is not replaced
    results = read_results(sweep.out)
    if len(waiting) < len(fits):
        stream = sys.stderr if options.dry_run else sys.stdout
        print(f"{len(fits) - len(waiting)} of {len(fits)} fits are in {sweep.table} already", file=stream, flush=True)
    if options.dry_run:
        for fit in waiting:
            print(shlex.join(["nernlit", *sweep.command(fit), *GLOBAL_OPTIONS.get()]))
        return
    seconds = [float(row["fit_seconds"]) for row in comparable(results, sweep)]
    _run(sweep, waiting, Outcome(len(fits), options.jobs, len(fits) - len(waiting), seconds))


def _parser() -> CommandParser:
    parser = CommandParser("sweep", __doc__, "All other options are those of `nernlit fit`.")
    parser.add_argument(
        "--configs", nargs="+", required=True, help="configurations to compare: files, or names of shipped ones"
    )
    parser.add_argument("--hidden", type=count, nargs="+", help="hidden widths (default: the configuration's own)")
    parser.add_argument("--seeds", type=seed, nargs="+", default=[0], help="one fit per width and seed (default: 0)")
    parser.add_argument("--out", type=path, default=Path("runs/sweep"), help="folder of the table and the figures")
    parser.add_argument("--select", choices=("best", "last"), default="best", help="checkpoint that is tested")
    parser.add_argument(
        "--jobs", type=count, default=1, help="fits that run at the same time; they divide the threads and the GPUs"
    )
    parser.add_argument(
        "--shard", type=_shard, metavar="K/N", help="run only every N-th fit, beginning with the K-th (K from 1 to N)"
    )
    parser.add_argument("--dry-run", action="store_true", help="print a command for each fit, and run nothing")
    return parser


def _run(sweep: Sweep, waiting: Sequence[Fit], outcome: Outcome) -> None:
    """Run the fits, and show the results of all that are finished.

    Raises:
        NernlitError: If fits failed.
    """
    try:
        (run_in_turn if outcome.jobs == 1 else run_side_by_side)(sweep, waiting, outcome)
    finally:  # also where a signal ends the sweep
        finished = comparable(tabulate(sweep), sweep)
        if finished or outcome.failed:
            print_summary(finished, outcome.failed)
    if finished:
        _draw(finished, sweep.out)
        print(f"table: {sweep.table}\nfigures: {sweep.out / 'sweep.png'}, widths.png")
        print(f"TensorBoard: tensorboard --logdir {sweep.out}")
    if outcome.claimed_by_others:
        names = "; ".join(fit.name for fit in outcome.claimed_by_others)
        print(f"{len(outcome.claimed_by_others)} of {outcome.total} fits are running in other processes: {names}")
    if outcome.failed:
        kept = f"{sweep.table} holds the others; " if finished else ""
        raise NernlitError(
            f"{len(outcome.failed)} of {outcome.total} fits failed; {kept}the same command runs only those again."
        )


def _shard(text: str) -> tuple[int, int]:
    """`K/N`, a share of the fits, as two numbers."""
    found = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text)
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise ArgumentTypeError(f"{text}; expected K/N, where N is the number of shares and K one of 1 to N")
    return int(found[1]), int(found[2])


def _draw(rows: Sequence[Row], out: Path) -> None:
    by_config = {
        name: [row for row in rows if row["config"] == name] for name in dict.fromkeys(r["config"] for r in rows)
    }
    original = common_original(rows)
    sizes = {str(name): [(float(row["cr_paper"]), float(row["acc"])) for row in own] for name, own in by_config.items()}
    write_figure(out / "sweep.png", tradeoff_figure(sizes, original, "accuracy against size"))
    widths = {
        str(name): [
            (int(row["hidden"]), float(row["acc"]), float(row["recon_rmse"]))
            for row in own
            if row["hidden"]  # a predictor of one's own may have no width
        ]
        for name, own in by_config.items()
    }
    write_figure(out / "widths.png", width_figure(widths, original))


def _refuse_options(fit_args: Sequence[str], sets_hidden: bool, options: Sequence[str]) -> None:
    refuse_own_options(_OWN_OPTIONS, fit_args)
    for arg, following in itertools.pairwise([*fit_args, ""]):
        flag, equals, value = arg.partition("=")
        given = f"{flag} {value if equals else following}"
        if flag in ("--trainer.devices", "--trainer.num_nodes") and given.split()[-1] != "1":
            # Several processes would each see a share of the test images, and all write the same table.
            raise UsageError(f"{given}: a sweep's fits run on one device; leave it out.")
        meant = [option for option in options if option.startswith(flag)]
        if meant and flag.startswith("--"):
            raise UsageError(f"there is no option {flag}; did you mean {', '.join(meant)}?")
        if sets_hidden and re.search(r"\.predictor(\.init_args)?\.hidden$", flag):
            raise UsageError(f"{given} and --hidden: both are the width; leave one of them out.")


def _require_distinct_names(configs: Sequence[str]) -> None:
    """Tables and folders name fits after their configuration."""
    names = Counter(Path(path).stem for path in {Path(config).resolve() for config in configs})
    for name, times in names.items():
        if times > 1:
            raise UsageError(
                f"--configs: {times} files are named {name}; rename them, so that the table tells them apart."
            )
