"""The analyses of `nernlit analyze`: one function per kind, from runs and options to the rows of a table and a figure.

All take the runs by name and the command's options, and raise `UsageError` for runs that they cannot analyze.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from matplotlib.figure import Figure

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
    ReestimatedBatchNorm,
    distance,
    evaluate,
    loss_grid,
    plane_through,
    random_plane,
)
from nernlit.analysis.landscape import (
    interpolate as interpolate_weights,
)
from nernlit.cli.images import Batches, OnDevice
from nernlit.cli.rounds import read_round
from nernlit.cli.runs import Run
from nernlit.errors import UsageError
from nernlit.representation import Representation
from nernlit.utilities.progress import counted, progress

Runs = Mapping[str, Run]  # unique name -> run
Rows = list[dict[str, Any]]
Outcome = tuple[Rows, Figure | None]

#: Number of training images for re-estimated BatchNorm statistics.
REESTIMATED_ON = 2_000


def _require_originals(runs: Runs, options: argparse.Namespace) -> None:
    for run in runs.values():
        run.require_original(f"`analyze {options.kind}`")


def _representations(runs: Runs) -> dict[str, Representation]:
    """Those of the runs, which must represent networks of the same layers."""
    found = {name: run.representation() for name, run in runs.items()}
    (first, one), *others = found.items()
    for name, other in others:
        if other.layout.layers != one.layout.layers:
            raise UsageError(f"{first} and {name} represent networks of different layers; analyze them one by one.")
    return found


def spectrum(runs: Runs, options: argparse.Namespace) -> Outcome:
    """Low-frequency energy of every layer, in the original and reconstructed (Fig. 2 and 8)."""
    _require_originals(runs, options)
    energies = {name: layer_energies(representation) for name, representation in _representations(runs).items()}
    rows = [{"run": name, **vars(e), "difference": e.difference} for name, own in energies.items() for e in own]
    return rows, energy_figure(energies)


def layers(runs: Runs, options: argparse.Namespace) -> Outcome:
    """Reconstruction error of every layer (Fig. 4)."""
    _require_originals(runs, options)
    errors = {name: layer_errors(representation) for name, representation in _representations(runs).items()}
    rows = [{"run": name, **vars(error)} for name, own in errors.items() for error in own]
    return rows, layer_error_figure(errors)


def interpolate(runs: Runs, options: argparse.Namespace) -> Outcome:
    """Loss and accuracy on the line from the original's weights to the reconstructed ones (Fig. 9)."""
    _require_originals(runs, options)
    (run,) = runs.values()
    representation = run.representation()
    start = representation.original_entries()
    with torch.no_grad():
        end = representation.entries()
    batches, classify = _batches(run, options), _classify(representation, run, options)
    rows = []
    with progress(f"measuring {options.points} points of a line", options.points * len(batches)) as advance:
        for share in torch.linspace(options.low, options.high, options.points).tolist():
            point = interpolate_weights(start, end, share)
            measured = evaluate(classify, point, counted(batches, advance))
            rows.append({"share": share, "distance": distance(start, point), **vars(measured)})
    return rows, interpolation_figure(rows, options.split, options.batch_norm)


def landscape(runs: Runs, options: argparse.Namespace) -> Outcome:
    """Loss and accuracy on a plane through weight space (Fig. 6 and 7)."""
    if len(runs) == 2:
        _require_originals(runs, options)
    if options.points < 2:
        raise UsageError(f"--points {options.points}: a plane needs at least 2 points a side.")
    representations, run = _representations(runs), next(iter(runs.values()))
    originals = {name: each.original.fingerprint() for name, each in representations.items()}
    if len(set(originals.values())) > 1:
        raise UsageError(
            f"{' and '.join(originals)} represent different originals, so no plane contains the original of both; "
            "analyze them one by one."
        )
    representation = next(iter(representations.values()))
    original = {key: value for each in representations.values() for key, value in each.original_entries().items()}
    with torch.no_grad():
        solutions = [original, *({**original, **each.entries()} for each in representations.values())]
    if len(runs) == 2:
        plane = plane_through(*solutions)
        names = ["original", *runs]
        xs, ys = (_around([mark[axis] for mark in plane.marks], options.points) for axis in (0, 1))
    else:
        plane = random_plane(solutions[1], torch.Generator().manual_seed(0))
        names = list(runs)
        xs = ys = torch.linspace(-1, 1, options.points).tolist()
    classify = _classify(representation, run, options)
    grid = loss_grid(classify, plane, xs, ys, _batches(run, options))
    rows = [
        {"x": x, "y": y, **vars(cell)}
        for y, line in zip(ys, grid, strict=True)
        for x, cell in zip(xs, line, strict=True)
    ]
    marks = dict(zip(names, plane.marks, strict=True))
    unit = "weight units" if len(runs) == 2 else "share of every filter's norm"
    return rows, landscape_figure(xs, ys, grid, marks, options.split, options.batch_norm, unit)


def _around(values: Sequence[float], points: int) -> list[float]:
    """Evenly spaced numbers over the range of the values, extended by a third on each side."""
    margin = (max(values) - min(values)) / 3
    line: list[float] = torch.linspace(min(values) - margin, max(values) + margin, points).tolist()
    return line


def rounds(runs: Runs, options: argparse.Namespace) -> Outcome:
    """Accuracy and reconstruction error of every round of a Progressive fit (Fig. 3)."""
    (run,) = runs.values()
    ended = run.rounds()
    representation, batches = run.representation(), _batches(run, options)
    original, network = representation.original_weights(), _network(representation, options)
    rows = []
    with progress(f"testing {len(ended)} rounds", (1 + len(ended)) * len(batches)) as advance:
        reference = correct_answers(partial(network, weights=original), counted(batches, advance))
        for each in ended:
            state = read_round(each, original)
            correct = correct_answers(partial(network, weights=state), counted(batches, advance))
            rows.append({"round": each.number, "rmse": each.recon_rmse, **_compared(correct, reference)})
    accuracies, distances = ([row[name] for row in rows] for name in ("accuracy", "rmse"))
    return rows, rounds_figure(accuracies, distances, float(reference.float().mean()), options.split)


def smooth(runs: Runs, options: argparse.Namespace) -> Outcome:
    """Accuracy of the original with smoothed weights, without a predictor, compared with the reconstructed network."""
    _require_originals(runs, options)
    (run,) = runs.values()
    representation, batches = run.representation(), _batches(run, options)
    original, network = representation.original_weights(), _network(representation, options)
    with torch.no_grad():
        reconstructed = representation.entries()
    order = _walks(representation)

    def gaussian(sigma: float) -> Mapping[str, torch.Tensor]:
        table = smoothing.gaussian_smooth(representation.target, order, sigma, representation.learned.weight_mask())
        return representation.layout.weights(table)

    # Computed one by one, where the progress is shown: for large networks each takes minutes and its own memory.
    candidates: dict[str, Callable[[], Mapping[str, torch.Tensor]]] = {"reconstructed": lambda: reconstructed}
    for keep in (0.9, 0.8, 0.7, 0.6, 0.5):
        candidates[f"SVD, {keep:.0%} kept"] = partial(smoothing.truncate_singular_values, original, keep)
    for by in (0.02, 0.05, 0.1, 0.2):
        candidates[f"lower half of SVD -{by:.0%}"] = partial(smoothing.shrink_singular_values, original, by)
    for sigma in (0.2, 0.25, 0.3, 0.4):
        candidates[f"Gaussian, sigma {sigma:g}"] = partial(gaussian, sigma)
    if run.has_rounds:
        ended = run.rounds()
        candidates[f"mean of {len(ended)} rounds"] = lambda: smoothing.average(
            [read_round(each, original) for each in ended]
        )
    rows = []
    with progress(f"testing {len(candidates)} networks", (1 + len(candidates)) * len(batches)) as advance:
        reference = correct_answers(partial(network, weights=original), counted(batches, advance))
        for name, smoothed in candidates.items():
            point = smoothed()
            correct = correct_answers(partial(network, weights=point), counted(batches, advance))
            rows.append({"weights": name, "distance": distance(original, point), **_compared(correct, reference)})
    return rows, None


def _walks(representation: Representation) -> list[torch.Tensor]:
    """Each layer's rows of the kernel table, sorted by address: neighbors in the order follow each other."""
    addresses = representation.addresses.long()
    walks = []
    for layer in representation.layout.layers:
        own = addresses[layer.rows]
        walks.append(layer.start + (own[:, 1] * (own[:, 2].max() + 1) + own[:, 2]).argsort())
    return walks


def _compared(correct: torch.Tensor, reference: torch.Tensor) -> dict[str, float]:
    return {"accuracy": float(correct.float().mean()), **vars(paired_difference(correct, reference))}


def _classify(representation: Representation, run: Run, options: argparse.Namespace) -> Classify:
    if options.batch_norm == "stored":
        return _network(representation, options)
    images = run.batches("train", overrides=options.data, at_most=REESTIMATED_ON)
    return ReestimatedBatchNorm(OnDevice(representation.original, options.device), images)


def _network(representation: Representation, options: argparse.Namespace) -> OnDevice:
    return OnDevice(representation.original, options.device)


def _batches(run: Run, options: argparse.Namespace) -> Batches:
    return run.batches(options.split, options.images, options.data)
