"""`nernlit analyze KIND RUN`: a table, a figure and a JSON file about a finished fit or a .nern file.

Kinds: `spectrum` (low-frequency energy of every layer) and `layers` (distance of every layer) of one run or several,
`interpolate` (from the original to the reconstructed network and beyond), `landscape` (the plane of the original and
two runs, or a random plane around one run), `rounds` (progressive rounds), `smooth` (the original's weights, smoothed
without a predictor).
"""

import argparse
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nernlit.cli import analyses
from nernlit.cli.analyses import Outcome, Rows, Runs
from nernlit.cli.arguments import CommandParser, count, finite, path, require_writable, split_options
from nernlit.cli.images import add_device, chosen_device
from nernlit.cli.runs import Run, distinct_names
from nernlit.errors import UsageError
from nernlit.storage.files import write_atomically, write_figure
from nernlit.utilities.tables import print_table

_IMAGES = ("split", "images")
#: Kind -> its function, the largest number of runs (None: any), and its options.
KINDS: dict[str, tuple[Callable[[Runs, argparse.Namespace], Outcome], int | None, Sequence[str]]] = {
    "spectrum": (analyses.spectrum, None, ()),
    "layers": (analyses.layers, None, ()),
    "interpolate": (analyses.interpolate, 1, (*_IMAGES, "batch_norm", "points", "low", "high")),
    "landscape": (analyses.landscape, 2, (*_IMAGES, "batch_norm", "points")),
    "rounds": (analyses.rounds, 1, _IMAGES),
    "smooth": (analyses.smooth, 1, _IMAGES),
}
_OPTIONS = (*_IMAGES, "batch_norm", "points", "low", "high")
_LONGEST_STEM = 120


def main(args: Sequence[str]) -> None:
    """Run the command with these arguments; `--data...` ones change the run's own data configuration."""
    parser = _parser()
    own_args, data = split_options(args, "--data")
    options = parser.parse_args(own_args)
    options.data = data
    analysis, _, uses = KINDS[options.kind]
    changed = [name for name in _OPTIONS if getattr(options, name) != parser.get_default(name)]
    _require_used(options, changed)
    options.device = chosen_device(options.device)
    opened = [Run.open(path, options.select, options.original) for path in options.runs]
    runs = dict(zip(distinct_names(opened), opened, strict=True))
    out = options.out or opened[0].folder / "analysis"
    require_writable(out, "--out")
    asked = {
        "kind": options.kind,
        # Relative to the folder, so that a run and its analyses may be moved together.
        "runs": {name: os.path.relpath(run.checkpoint, out) for name, run in runs.items()},
        "options": {name: getattr(options, name) for name in uses} | ({"data": data} if data else {}),
    }
    file = out / f"{_stem(options, runs, changed)}.json"
    _refuse_other(file, asked)
    rows, figure = analysis(runs, options)
    images = f", {options.split} images" if uses else ""
    _print(rows, f"{options.kind}: {', '.join(runs)}{images}")
    finite_rows = [{name: value if _is_finite(value) else None for name, value in row.items()} for row in rows]
    write_atomically(file, json.dumps({**asked, "rows": finite_rows}, indent=1).encode())
    print(file)
    if figure is not None:
        write_figure(file.with_suffix(".png"), figure)
        print(file.with_suffix(".png"))


def _parser() -> CommandParser:
    parser = CommandParser("analyze", __doc__)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="folder of a fit (runs/<name>/version_N), a checkpoint or a .nern file"
    )
    parser.add_argument("--select", choices=("best", "last"), help="which of a run's checkpoints (default: best)")
    parser.add_argument("--split", choices=("test", "train"), default="test", help="split whose images are used")
    parser.add_argument("--images", type=count, help="number of images (default: all)")
    parser.add_argument(
        "--batch_norm",
        choices=("stored", "reestimated"),
        default="stored",
        help=f"statistics in interpolate and landscape: stored, or estimated on {analyses.REESTIMATED_ON} images",
    )
    parser.add_argument(
        "--points",
        type=count,
        default=9,
        help="points of a line (1: its first point), or of each side of a plane (default: 9)",
    )
    parser.add_argument(
        "--low", type=finite, default=-0.5, help="start of the interpolation; 0: the original (default: -0.5)"
    )
    parser.add_argument(
        "--high",
        type=finite,
        default=1.5,
        help="end of the interpolation; 1: the reconstructed network (default: 1.5)",
    )
    parser.add_argument(
        "--out",
        type=path,
        help="folder of the figure and the JSON file (default: `analysis` beside the first run's files)",
    )
    add_device(parser)
    parser.add_original()
    return parser


def _require_used(options: argparse.Namespace, changed: Sequence[str]) -> None:
    """Check that the analysis takes so many runs, and uses the options that were given.

    Args:
        options: The options.
        changed: Those of `_OPTIONS` that are not the defaults.

    Raises:
        UsageError: If it does not.
    """
    _, most, uses = KINDS[options.kind]
    if most is not None and len(options.runs) > most:
        raise UsageError(
            f"`analyze {options.kind}` takes {most} run{'s' * (most > 1)}; {len(options.runs)} were given."
        )
    for name in changed:
        if name not in uses:
            raise UsageError(f"`analyze {options.kind}` has no option --{name}; leave it out.")
    if options.device is not None and not uses:
        raise UsageError(f"`analyze {options.kind}` classifies no images; leave out --device.")
    if options.data and not uses:
        raise UsageError(f"`analyze {options.kind}` does not use data; leave out {' '.join(options.data)}.")
    if options.low >= options.high:
        raise UsageError(f"--low {options.low:g} --high {options.high:g}: expected the low end first.")


def _stem(options: argparse.Namespace, runs: Runs, changed: Sequence[str]) -> str:
    """A file name of the kind, the runs if the folder does not identify them, and all non-default options."""
    if options.out is None and len(runs) == 1:
        (run,) = runs.values()
        named = [run.name] if run.is_file else [] if run.checkpoint.stem == "best" else [run.checkpoint.stem]
    else:
        last = {name for name, run in runs.items() if run.checkpoint.stem == "last" and not name.endswith("/last")}
        named = [f"{name}-last" if name in last else name for name in runs]
    settings = [f"{name}-{getattr(options, name)}" for name in changed]
    settings += [option.removeprefix("--") for option in options.data]
    stem = re.sub(r"[^\w.+-]+", "-", "_".join([options.kind, *named, *settings]))
    if len(stem) <= _LONGEST_STEM:
        return stem
    return f"{stem[: _LONGEST_STEM - 9]}_{hashlib.sha256(stem.encode()).hexdigest()[:8]}"


def _refuse_other(file: Path, asked: Mapping[str, Any]) -> None:
    """Refuse to overwrite a file that is not an earlier result of the same analysis."""
    if not file.exists():
        return
    try:
        before = json.loads(file.read_text(encoding="utf-8"))
        # Not the runs' names, which change with the folders above them.
        is_same = list(before["runs"].values()) == list(asked["runs"].values())
        is_same = is_same and (before["kind"], before["options"]) == (asked["kind"], asked["options"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        is_same = False
    if not is_same:
        raise UsageError(f"{file} belongs to another analysis; move it, or pass another folder as --out.")


def _is_finite(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)  # JSON has neither infinity nor NaN


def _print(rows: Rows, title: str) -> None:
    names = sum(isinstance(value, str) for value in rows[0].values())
    cells = [[value if isinstance(value, str) else f"{value:.4g}" for value in row.values()] for row in rows]
    print_table(title, list(rows[0]), cells, names)
