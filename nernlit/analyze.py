"""`nernlit analyze KIND RUN`: a table, a figure and JSON of a finished fit.

Kinds: `spectrum` (low-frequency energy of every layer) and `layers` (distance of every layer) of one run or several,
`interpolate` (from the original to the reconstructed network and beyond), `landscape` (the plane of the original and
two runs, or a random plane around one run), `rounds` (progressive rounds), `smooth` (the original's weights, smoothed
without a predictor).
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from nernlit import analyses
from nernlit.analyses import Outcome, Rows, Runs
from nernlit.errors import UsageError
from nernlit.files import write_atomically, write_figure
from nernlit.runs import Run, distinct_names

_IMAGES = ("split", "images")
#: What is done, with how many runs at most, and by which options.
KINDS: dict[str, tuple[Callable[[Runs, argparse.Namespace], Outcome], int | None, Sequence[str]]] = {
    "spectrum": (analyses.spectrum, None, ()),
    "layers": (analyses.layers, None, ()),
    "interpolate": (analyses.interpolate, 1, (*_IMAGES, "batch_norm", "points", "low", "high")),
    "landscape": (analyses.landscape, 2, (*_IMAGES, "batch_norm", "points")),
    "rounds": (analyses.rounds, 1, _IMAGES),
    "smooth": (analyses.smooth, 1, _IMAGES),
}


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise ValueError
    return number


def main(args: Sequence[str]) -> None:
    """Run the command with these arguments; `--data...` ones change the run's own data configuration."""
    parser = argparse.ArgumentParser(prog="nernlit analyze", description=__doc__, allow_abbrev=False)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="folder of a fit (runs/<name>/version_N) or a checkpoint"
    )
    parser.add_argument("--select", choices=("best", "last"), default="best", help="which of a run's checkpoints")
    parser.add_argument("--split", choices=("test", "train"), default="test", help="images to measure on")
    parser.add_argument("--images", type=_positive, help="how many of them (default: all)")
    parser.add_argument(
        "--batch_norm",
        choices=("stored", "reestimated"),
        default="stored",
        help=f"in interpolate and landscape: the original's, or anew on {analyses.REESTIMATED_ON} training images",
    )
    parser.add_argument("--points", type=_positive, default=9, help="of a line, or of a plane's side")
    parser.add_argument("--low", type=float, default=-0.5, help="where interpolation begins; the original is at 0")
    parser.add_argument("--high", type=float, default=1.5, help="where it ends; the reconstructed network is at 1")
    parser.add_argument("--out", type=Path, help="folder of the figure and the JSON (default: RUN/analysis)")
    options, overrides = parser.parse_known_args(args)
    options.data = overrides
    analysis, most, uses = KINDS[options.kind]
    if most is not None and len(options.runs) > most:
        raise UsageError(
            f"`analyze {options.kind}` takes {most} run{'s' * (most > 1)}; {len(options.runs)} were given."
        )
    for name in (*_IMAGES, "batch_norm", "points", "low", "high"):
        if name not in uses and getattr(options, name) != parser.get_default(name):
            raise UsageError(f"`analyze {options.kind}` has no use for --{name}; leave it out.")
    if overrides and not uses:
        raise UsageError(f"`analyze {options.kind}` looks at no data; leave out {' '.join(overrides)}.")
    opened = [Run.open(path, options.select) for path in options.runs]
    runs = dict(zip(distinct_names(opened), opened, strict=True))
    rows, figure = analysis(runs, options)
    out = options.out or opened[0].folder / "analysis"
    stem = options.kind if options.split == "test" else f"{options.kind}_{options.split}"
    write_atomically(out / f"{stem}.json", json.dumps(rows, indent=1).encode())
    console = Console()
    looked_at = f", {options.split} images" if uses else ""
    console.print(_table(rows, f"{options.kind}: {', '.join(runs)}{looked_at}"))
    written = [out / f"{stem}.json"]
    if figure is not None:
        written.append(out / f"{stem}.png")
        write_figure(written[-1], figure)
    for file in written:
        console.print(str(file), soft_wrap=True, highlight=False)


def _table(rows: Rows, title: str) -> Table:
    table = Table(title=title, title_justify="left")
    for column in rows[0]:
        table.add_column(column, justify="left" if isinstance(rows[0][column], str) else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(value if isinstance(value, str) else f"{value:.4g}" for value in row.values()))
    return table
