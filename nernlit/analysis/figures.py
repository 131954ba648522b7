"""Matplotlib figures of representations and fits; they are returned and not shown in a window."""

import itertools
import math
from collections.abc import Mapping, Sequence

import torch
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from nernlit.analysis.landscape import Evaluation
from nernlit.analysis.layers import LayerError
from nernlit.analysis.spectrum import LayerEnergy
from nernlit.representation import Representation


def layer_error_figure(errors: Mapping[str, Sequence[LayerError]]) -> Figure:
    """Bars per layer: root-mean-square error above, unexplained power (1 - explained power) below.

    Args:
        errors: Network name -> the errors of its layers; all networks have the same layers.
    """
    (some, *_) = errors.values()
    figure = Figure(figsize=(max(6.0, 0.28 * len(some)), 5.0), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    _bars(upper, {name: [error.rmse for error in own] for name, own in errors.items()})
    upper.set_ylabel("RMSE (weight units)")
    _bars(lower, {name: [100 * (1 - error.explained_power) for error in own] for name, own in errors.items()})
    lower.set_ylabel("unexplained power (%)")
    lower.set_xticks(range(len(some)), [error.name for error in some], rotation=90, fontsize=7)
    _legend(figure, upper)
    return figure


def energy_figure(energies: Mapping[str, Sequence[LayerEnergy]]) -> Figure:
    """Bars per layer: low-frequency energy of the reconstructed weight minus the original's, in percentage points.

    Args:
        energies: Network name -> the energies of its layers; all networks have the same layers.
    """
    (some, *_) = energies.values()
    figure = Figure(figsize=(max(6.0, 0.28 * len(some)), 3.4), layout="constrained")
    axis = figure.subplots()
    _bars(axis, {name: [100 * energy.difference for energy in own] for name, own in energies.items()})
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set_ylabel("low-frequency energy,\nreconstructed - original (points)")
    axis.set_xticks(range(len(some)), [energy.name for energy in some], rotation=90, fontsize=7)
    _legend(figure, axis)
    return figure


def _bars(axis: Axes, series: Mapping[str, Sequence[float]]) -> None:
    """One group of bars per layer, with one bar per series."""
    width = 0.8 / len(series)
    for number, (name, values) in enumerate(series.items()):
        offset = (number - (len(series) - 1) / 2) * width
        axis.bar([place + offset for place in range(len(values))], values, width, label=literal_label(name))


def literal_label(name: str) -> str:
    """A label that matplotlib shows literally: `$` would start a formula, and a leading `_` would hide the label."""
    escaped = name.replace("$", r"\$")
    return f" {escaped}" if escaped.startswith("_") else escaped


def _legend(figure: Figure, axis: Axes) -> None:
    """Add a legend above the axes if there is more than one series."""
    handles, names = axis.get_legend_handles_labels()
    if len(names) > 1:
        figure.legend(handles, names, loc="outside upper center", ncols=2, fontsize=7)


@torch.no_grad()
def kernel_figure(representation: Representation, count: int = 10) -> Figure:
    """The kernel of largest norm of `count` layers: the original's in the upper row, reconstructed in the lower row."""
    layout = representation.layout
    picked = torch.linspace(0, len(layout.layers) - 1, min(count, len(layout.layers))).round().long().tolist()
    layers = [layout.layers[number] for number in picked]
    rows = torch.tensor(
        [layer.start + int(representation.target[layer.rows].flatten(1).norm(dim=1).argmax()) for layer in layers],
        device=representation.target.device,
    )
    pairs = torch.stack([representation.target[rows], representation.kernels(rows)]).cpu()
    figure = Figure(figsize=(1.1 * len(layers) + 0.6, 2.8), layout="constrained")
    axes = figure.subplots(2, len(layers), squeeze=False)
    for column, layer in enumerate(layers):
        limit = float(pairs[:, column].abs().max())
        for row, title in enumerate(("original", "reconstructed")):
            axis = axes[row, column]
            axis.imshow(pairs[row, column].tolist(), cmap="RdBu_r", vmin=-limit, vmax=limit)
            axis.set_xticks([])
            axis.set_yticks([])
            if column == 0:
                axis.set_ylabel(title, fontsize=8)
        axes[0, column].set_title(layer.name, fontsize=7)
    return figure


def rounds_figure(
    accuracy: Sequence[float], rmse: Sequence[float], original: float, split: str = "validation"
) -> Figure:
    """Accuracy (%) and distance from the original over progressive rounds (arXiv 2407.00356, Fig. 3).

    Args:
        accuracy: Accuracy after each round, as a fraction.
        rmse: Root-mean-square difference from the original's weights after each round.
        original: The original's accuracy.
        split: The split that the accuracies were measured on.
    """
    figure = Figure(figsize=(6.0, 3.8), layout="constrained")
    left = figure.subplots()
    numbers = range(1, len(accuracy) + 1)
    left.axhline(100 * original, color="black", linestyle="--", linewidth=1, label=f"original {100 * original:.2f}%")
    left.plot(numbers, [100 * value for value in accuracy], "o-", color="tab:blue", label="accuracy")
    left.set_xticks(list(numbers))
    left.set_xlabel("round")
    left.set_ylabel(f"{split} accuracy (%)")
    left.grid(alpha=0.3)
    right = left.twinx()
    right.plot(numbers, rmse, "s:", color="tab:orange", label="distance from the original")
    right.set_ylabel("RMSE (weight units)")
    right.set_ylim(bottom=0)
    figure.legend(loc="outside upper center", ncols=3, fontsize=8)
    return figure


def interpolation_figure(points: Sequence[Mapping[str, float]], split: str, batch_norm: str = "stored") -> Figure:
    """Accuracy (%) and distance along (1 - share) original + share reconstructed (arXiv 2407.00356, Fig. 9).

    Args:
        points: Dictionaries with `share`, `accuracy` and `distance`.
        split: The split that the accuracies were measured on.
        batch_norm: The BatchNorm statistics used: `stored` or `reestimated`.
    """
    figure = Figure(figsize=(6.0, 3.8), layout="constrained")
    left = figure.subplots()
    shares = [point["share"] for point in points]
    left.plot(shares, [100 * point["accuracy"] for point in points], "o-", color="tab:blue", label="accuracy")
    for share, name in ((0, "original"), (1, "reconstructed")):
        left.axvline(share, color="gray", linestyle=":", linewidth=1)
        left.annotate(name, (share, 1.01), xycoords=("data", "axes fraction"), fontsize=8, ha="center")
    left.set_xlabel("share of the reconstructed weights")
    left.set_ylabel(f"{split} accuracy (%)")
    left.set_title(f"BatchNorm statistics: {batch_norm}", fontsize=8, pad=16)
    left.grid(alpha=0.3)
    right = left.twinx()
    distances = [point["distance"] for point in points]
    right.plot(shares, distances, "s:", color="tab:orange", label="distance from the original")
    right.set_ylabel("Euclidean distance (weight units)")
    figure.legend(loc="outside upper center", ncols=2, fontsize=8)
    return figure


def landscape_figure(
    xs: Sequence[float],
    ys: Sequence[float],
    grid: Sequence[Sequence[Evaluation]],
    marks: Mapping[str, tuple[float, float]],
    split: str,
    batch_norm: str = "stored",
    unit: str = "weight units",
) -> Figure:
    """Loss, on a logarithmic scale, over a plane in weight space, with named points (arXiv 2407.00356, Fig. 6 and 7).

    Args:
        xs: Coordinates of the grid's columns.
        ys: Coordinates of the grid's rows.
        grid: Loss and accuracy at each grid point, row by row.
        marks: Point name -> (x, y).
        split: The split that the losses were measured on.
        batch_norm: The BatchNorm statistics used: `stored` or `reestimated`.
        unit: Unit of both axes.
    """
    figure = Figure(figsize=(6.0, 4.8), layout="constrained")
    axis = figure.subplots()
    finite = [cell.loss for line in grid for cell in line if math.isfinite(cell.loss)] or [1.0]
    lowest, highest = max(min(finite), 1e-12), max(*finite, 1e-12)
    losses = [[min(max(cell.loss, lowest), highest) for cell in line] for line in grid]
    # In float64: in float32 levels of nearly equal losses would be equal.
    levels = torch.logspace(math.log10(lowest), math.log10(highest * (1 + 1e-6)), 25, dtype=torch.float64).tolist()
    filled = axis.contourf(xs, ys, losses, levels=levels, norm=LogNorm(), cmap="viridis")
    figure.colorbar(filled, label=f"{split} loss", ticks=levels[::4], format="%.4g")
    for (name, (x, y)), shape in zip(marks.items(), itertools.cycle("o^sDv*"), strict=False):
        axis.plot(x, y, shape, color="white", markeredgecolor="black", linestyle="none", label=literal_label(name))
    axis.set_aspect("equal")
    axis.set_xlabel(unit)
    axis.set_ylabel(unit)
    axis.set_title(f"BatchNorm statistics: {batch_norm}", fontsize=8)
    figure.legend(loc="outside upper center", ncols=1, fontsize=8)
    return figure


def curves_figure(curves: Mapping[str, Sequence[tuple[int, float]]], title: str) -> Figure:
    """A logged metric over steps: run name -> (step, value)."""
    figure = Figure(figsize=(7.0, 3.4), layout="constrained")
    axis = figure.subplots()
    for name, points in curves.items():
        axis.plot(
            [step for step, _ in points], [value for _, value in points], label=literal_label(name), linewidth=1.2
        )
    axis.set_xlabel("step")
    axis.set_title(title)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return figure
