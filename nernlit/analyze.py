"""`nernlit analyze KIND RUN`: a table, a figure and JSON of a finished fit.

Kinds: `spectrum` (low-frequency energy of every layer) and `layers` (distance of every layer) of one run or several,
`interpolate` (from the original to the reconstructed network and beyond), `landscape` (the plane of the original and
two runs, or a random plane around one run), `rounds` (progressive rounds), `smooth` (the original's weights, smoothed
without a predictor).
"""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

from nernlit.analysis import (
    correct_answers,
    energy_figure,
    interpolation_figure,
    landscape_figure,
    layer_energies,
    layer_error_figure,
    layer_errors,
    paired_difference,
    rounds_figure,
    smoothing,
)
from nernlit.analysis.landscape import (
    Classify,
    Reestimated,
    between,
    distance,
    plane_through,
    quality,
    random_plane,
    survey,
)
from nernlit.errors import UsageError
from nernlit.files import write_atomically
from nernlit.representation import Representation
from nernlit.runs import Batches, Run

Rows = list[dict[str, Any]]
Outcome = tuple[Rows, Figure | None]

_REESTIMATED_ON = 2_000  # images


def _original(representation: Representation) -> dict[str, torch.Tensor]:
    return representation.layout.weights(representation.target)


def spectrum(runs: Sequence[Run], options: argparse.Namespace) -> Outcome:
    """Fig. 2 and 8."""
    energies = {run.name: layer_energies(run.representation()) for run in runs}
    rows = [{"run": name, **vars(e), "difference": e.difference} for name, own in energies.items() for e in own]
    return rows, energy_figure(energies)


def layers(runs: Sequence[Run], options: argparse.Namespace) -> Outcome:
    """Fig. 4."""
    errors = {run.name: layer_errors(run.representation()) for run in runs}
    rows = [{"run": name, **vars(error)} for name, own in errors.items() for error in own]
    return rows, layer_error_figure(errors)


def interpolate(runs: Sequence[Run], options: argparse.Namespace) -> Outcome:
    """Fig. 9."""
    representation = runs[0].representation()
    start = _original(representation)
    with torch.no_grad():
        end = representation.weights()
    batches, classify = _batches(runs[0], options), _classify(representation, runs[0], options)
    rows = []
    for share in torch.linspace(options.low, options.high, options.points).tolist():
        point = between(start, end, share)
        measured = quality(classify, point, batches)
        rows.append({"share": share, "distance": distance(start, point), **vars(measured)})
    return rows, interpolation_figure(rows, options.split, options.batch_norm)


def landscape(runs: Sequence[Run], options: argparse.Namespace) -> Outcome:
    """Fig. 6 and 7."""
    representation = runs[0].representation()
    with torch.no_grad():
        solutions = [_original(representation), *(run.representation().weights() for run in runs)]
    if len(runs) == 2:
        plane = plane_through(*solutions)
        names = ["original", *(run.name for run in runs)]
        xs, ys = (_around([mark[axis] for mark in plane.marks], options.points) for axis in (0, 1))
    elif len(runs) == 1:
        plane = random_plane(solutions[1], torch.Generator().manual_seed(0))
        names = [runs[0].name]
        xs = ys = torch.linspace(-1, 1, options.points).tolist()
    else:
        raise UsageError(f"{len(runs)} runs; expected two (the original and they span a plane) or one (random plane).")
    classify = _classify(representation, runs[0], options)
    grid = survey(classify, plane, xs, ys, _batches(runs[0], options))
    rows = [
        {"x": x, "y": y, **vars(cell)}
        for y, line in zip(ys, grid, strict=True)
        for x, cell in zip(xs, line, strict=True)
    ]
    marks = dict(zip(names, plane.marks, strict=True))
    unit = "weight units" if len(runs) == 2 else "share of every filter's norm"
    return rows, landscape_figure(xs, ys, grid, marks, options.split, options.batch_norm, unit)


def _around(values: Sequence[float], points: int) -> list[float]:
    """A line over the values and a third of their span beyond."""
    margin = (max(values) - min(values)) / 3
    line: list[float] = torch.linspace(min(values) - margin, max(values) + margin, points).tolist()
    return line


def rounds(runs: Sequence[Run], options: argparse.Namespace) -> Outcome:
    """Fig. 3."""
    run = runs[0]
    record = run.folder / "rounds" / "rounds.json"
    if not record.is_file():
        raise UsageError(f"{run.folder} has no rounds/rounds.json: it is no run of Progressive.")
    representation, batches = run.representation(), _batches(run, options)
    original = _original(representation)
    reference = _correct(representation, original, batches)
    rows = []
    for ended in json.loads(record.read_text()):
        file = run.folder / "rounds" / f"round-{ended['round']:02d}.safetensors"
        state = load_file(file)
        correct = _correct(representation, {k: state[k] for k in original}, batches)
        rows.append({"round": ended["round"], "rmse": ended["recon_rmse"], **_compared(correct, reference)})
    accuracies, distances = ([row[name] for row in rows] for name in ("accuracy", "rmse"))
    return rows, rounds_figure(accuracies, distances, float(reference.float().mean()), options.split)


def smooth(runs: Sequence[Run], options: argparse.Namespace) -> Outcome:
    """The paper's open question: does smoothing without a predictor do as well?"""
    representation, batches = runs[0].representation(), _batches(runs[0], options)
    original = _original(representation)
    with torch.no_grad():
        candidates = {"reconstructed": representation.weights()}
    for keep in (0.9, 0.8, 0.7, 0.6, 0.5):
        candidates[f"SVD, {keep:.0%} kept"] = smoothing.truncated(original, keep)
    for by in (0.02, 0.05, 0.1, 0.2):
        candidates[f"lower half of SVD -{by:.0%}"] = smoothing.shrunk(original, by)
    order = _walks(representation)
    for sigma in (0.2, 0.25, 0.3, 0.4):
        table = smoothing.blurred(representation.target, order, sigma)
        candidates[f"Gaussian, sigma {sigma:g}"] = representation.layout.weights(table)
    files = sorted((runs[0].folder / "rounds").glob("round-*.safetensors"))
    if files:
        states = [load_file(file) for file in files]
        candidates[f"mean of {len(files)} rounds"] = smoothing.averaged([{k: s[k] for k in original} for s in states])
    reference = _correct(representation, original, batches)
    rows = [
        {
            "weights": name,
            "distance": distance(original, point),
            **_compared(_correct(representation, point, batches), reference),
        }
        for name, point in candidates.items()
    ]
    return rows, None


def _walks(representation: Representation) -> list[torch.Tensor]:
    """Each layer's rows of the kernel table, sorted by address: neighbours in the order follow each other."""
    addresses = representation.addresses.long()
    walks = []
    for layer in representation.layout.layers:
        own = addresses[layer.rows]
        walks.append(layer.start + (own[:, 1] * (own[:, 2].max() + 1) + own[:, 2]).argsort())
    return walks


def _correct(representation: Representation, point: Mapping[str, torch.Tensor], batches: Batches) -> torch.Tensor:
    return correct_answers(partial(representation, weights=point), batches)


def _compared(correct: torch.Tensor, reference: torch.Tensor) -> dict[str, float]:
    return {"accuracy": float(correct.float().mean()), **vars(paired_difference(correct, reference))}


def _classify(representation: Representation, run: Run, options: argparse.Namespace) -> Classify:
    if options.batch_norm == "stored":
        return representation
    return Reestimated(representation.original, run.batches("train", _REESTIMATED_ON, options.data))


def _batches(run: Run, options: argparse.Namespace) -> Batches:
    return run.batches(options.split, options.images, options.data)


KINDS: dict[str, Callable[[Sequence[Run], argparse.Namespace], Outcome]] = {
    kind.__name__: kind for kind in (spectrum, layers, interpolate, landscape, rounds, smooth)
}


def main(args: Sequence[str]) -> None:
    """Run the command with these arguments; `--data...` ones change the run's own data configuration."""
    parser = argparse.ArgumentParser(prog="nernlit analyze", description=__doc__)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="folder of a fit (runs/<name>/version_N) or a checkpoint"
    )
    parser.add_argument("--select", choices=("best", "last"), default="best", help="which of a run's checkpoints")
    parser.add_argument("--split", choices=("test", "train"), default="test", help="images to measure on")
    parser.add_argument("--images", type=int, help="how many of them (default: all)")
    parser.add_argument(
        "--batch_norm",
        choices=("stored", "reestimated"),
        default="stored",
        help=f"in interpolate and landscape: the original's, or measured anew on {_REESTIMATED_ON} training images",
    )
    parser.add_argument("--points", type=int, default=9, help="of a line, or of a plane's side")
    parser.add_argument("--low", type=float, default=-0.5, help="where interpolation begins; the original is at 0")
    parser.add_argument("--high", type=float, default=1.5, help="where it ends; the reconstructed network is at 1")
    parser.add_argument("--out", type=Path, help="folder of the figure and the JSON (default: RUN/analysis)")
    options, overrides = parser.parse_known_args(args)
    options.data = overrides
    runs = [Run.open(path, options.select) for path in options.runs]
    rows, figure = KINDS[options.kind](runs, options)
    out = options.out or runs[0].folder / "analysis"
    stem = options.kind if options.split == "test" else f"{options.kind}_{options.split}"
    write_atomically(out / f"{stem}.json", json.dumps(rows, indent=1).encode())
    console = Console()
    console.print(_table(rows, f"{options.kind}: {', '.join(run.name for run in runs)}, {options.split} images"))
    written = [out / f"{stem}.json"]
    if figure is not None:
        written.append(out / f"{stem}.png")
        figure.savefig(written[-1], dpi=150)
    for file in written:
        console.print(str(file), soft_wrap=True, highlight=False)


def _table(rows: Rows, title: str) -> Table:
    table = Table(title=title, title_justify="left")
    for column in rows[0]:
        table.add_column(column, justify="left" if isinstance(rows[0][column], str) else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(value if isinstance(value, str) else f"{value:.4g}" for value in row.values()))
    return table
