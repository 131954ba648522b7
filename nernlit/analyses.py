"""What `nernlit analyze` can do with finished fits: one function a kind, from runs and options to rows and a figure.

All take the runs by name and the command's options, and raise `UsageError` for runs that they cannot analyse.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from matplotlib.figure import Figure
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
from nernlit.representation import Representation
from nernlit.runs import Batches, Run

Runs = Mapping[str, Run]  # by names that tell them apart
Rows = list[dict[str, Any]]
Outcome = tuple[Rows, Figure | None]

#: Training images for statistics that are measured anew.
REESTIMATED_ON = 2_000


def _representations(runs: Runs) -> dict[str, Representation]:
    """Those of the runs, which must represent networks of the same layers."""
    found = {name: run.representation() for name, run in runs.items()}
    (first, one), *others = found.items()
    for name, other in others:
        if other.layout.layers != one.layout.layers:
            raise UsageError(f"{first} and {name} represent networks of different layers; analyse them one by one.")
    return found


def spectrum(runs: Runs, options: argparse.Namespace) -> Outcome:
    """Fig. 2 and 8."""
    energies = {name: layer_energies(representation) for name, representation in _representations(runs).items()}
    rows = [{"run": name, **vars(e), "difference": e.difference} for name, own in energies.items() for e in own]
    return rows, energy_figure(energies)


def layers(runs: Runs, options: argparse.Namespace) -> Outcome:
    """Fig. 4."""
    errors = {name: layer_errors(representation) for name, representation in _representations(runs).items()}
    rows = [{"run": name, **vars(error)} for name, own in errors.items() for error in own]
    return rows, layer_error_figure(errors)


def interpolate(runs: Runs, options: argparse.Namespace) -> Outcome:
    """Fig. 9."""
    (run,) = runs.values()
    representation = run.representation()
    start = representation.original_weights()
    with torch.no_grad():
        end = representation.weights()
    batches, classify = _batches(run, options), _classify(representation, run, options)
    rows = []
    for share in torch.linspace(options.low, options.high, options.points).tolist():
        point = between(start, end, share)
        measured = quality(classify, point, batches)
        rows.append({"share": share, "distance": distance(start, point), **vars(measured)})
    return rows, interpolation_figure(rows, options.split, options.batch_norm)


def landscape(runs: Runs, options: argparse.Namespace) -> Outcome:
    """Fig. 6 and 7."""
    representations, run = _representations(runs), next(iter(runs.values()))
    representation = next(iter(representations.values()))
    with torch.no_grad():
        solutions = [representation.original_weights(), *(each.weights() for each in representations.values())]
    if len(runs) == 2:
        plane = plane_through(*solutions)
        names = ["original", *runs]
        xs, ys = (_around([mark[axis] for mark in plane.marks], options.points) for axis in (0, 1))
    else:
        plane = random_plane(solutions[1], torch.Generator().manual_seed(0))
        names = list(runs)
        xs = ys = torch.linspace(-1, 1, options.points).tolist()
    classify = _classify(representation, run, options)
    grid = survey(classify, plane, xs, ys, _batches(run, options))
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


def rounds(runs: Runs, options: argparse.Namespace) -> Outcome:
    """Fig. 3."""
    (run,) = runs.values()
    record = run.folder / "rounds" / "rounds.json"
    if not record.is_file():
        raise UsageError(f"{run.folder} has no rounds/rounds.json: it is no run of Progressive.")
    representation, batches = run.representation(), _batches(run, options)
    original = representation.original_weights()
    reference = _correct(representation, original, batches)
    rows = []
    for ended in json.loads(record.read_text(encoding="utf-8")):
        file = run.folder / "rounds" / f"round-{ended['round']:02d}.safetensors"
        state = load_file(file)
        correct = _correct(representation, {k: state[k] for k in original}, batches)
        rows.append({"round": ended["round"], "rmse": ended["recon_rmse"], **_compared(correct, reference)})
    accuracies, distances = ([row[name] for row in rows] for name in ("accuracy", "rmse"))
    return rows, rounds_figure(accuracies, distances, float(reference.float().mean()), options.split)


def smooth(runs: Runs, options: argparse.Namespace) -> Outcome:
    """The paper's open question: does smoothing without a predictor do as well?"""
    (run,) = runs.values()
    representation, batches = run.representation(), _batches(run, options)
    original = representation.original_weights()
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
    files = sorted((run.folder / "rounds").glob("round-*.safetensors"))
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
    return Reestimated(representation.original, run.batches("train", REESTIMATED_ON, options.data))


def _batches(run: Run, options: argparse.Namespace) -> Batches:
    return run.batches(options.split, options.images, options.data)
