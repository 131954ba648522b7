"""Matplotlib figures that compare the accuracies of several runs or files; they are returned and not shown."""

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nernlit.analysis.figures import literal_label

#: The accuracy axis of `pareto_figure` ends this many percentage points below the original.
_MAX_SHOWN_DROP = 15.0


def tradeoff_figure(runs: Mapping[str, Sequence[tuple[float, float]]], original: float | None, title: str) -> Figure:
    """Test accuracy (%) against CR (%).

    Args:
        runs: Configuration name -> (CR, accuracy) of its runs, as fractions.
        original: The original's accuracy, drawn as a line; None if the runs have different originals.
        title: The title.
    """
    figure = Figure(figsize=(6.0, 3.8), layout="constrained")
    axis = figure.subplots()
    _original_line(axis, original)
    for name, points in runs.items():
        axis.plot(
            [100 * cr for cr, _ in points], [100 * accuracy for _, accuracy in points], "o", label=literal_label(name)
        )
    axis.axvline(100, color="gray", linestyle=":", linewidth=1)
    axis.set_xlabel("CR: predictor parameters / predicted weights (%)")
    axis.set_ylabel("test accuracy (%)")
    axis.set_title(title)
    axis.grid(alpha=0.3)
    axis.legend(loc="lower right")
    return figure


def pareto_figure(files: Mapping[str, Sequence[tuple[int, float]]], original: tuple[int, float], title: str) -> Figure:
    """Test accuracy (%) against the bytes of files, on a logarithmic axis, with the Pareto front.

    Accuracies far below the original's are not shown; the title says how many.

    Args:
        files: Method -> (bytes, accuracy as a fraction) of its files.
        original: Bytes and accuracy of the original, drawn as lines.
        title: The title.
    """
    figure = Figure(figsize=(7.5, 4.4), layout="constrained")
    axis = figure.subplots()
    _original_line(axis, original[1])
    axis.axvline(original[0], color="gray", linestyle=":", linewidth=1, label="the original's bytes")
    every = sorted(point for points in files.values() for point in points)
    front = pareto_front(every)
    axis.plot(
        [size for size, _ in front],
        [100 * accuracy for _, accuracy in front],
        color="gray",
        linewidth=4,
        alpha=0.3,
        drawstyle="steps-post",
        label="Pareto front",
    )
    least = 100 * original[1] - _MAX_SHOWN_DROP
    for name, points in files.items():
        sizes, accuracies = zip(*sorted(points), strict=True)
        shown = literal_label(name) if 100 * max(accuracies) >= least else f"{literal_label(name)} (below)"
        axis.plot(sizes, [100 * value for value in accuracies], "o-", markersize=4, label=shown)
    hidden = sum(100 * accuracy < least for _, accuracy in every)
    if hidden:
        axis.set_ylim(bottom=least)
    axis.set_xscale("log")
    axis.set_xlabel("bytes of the file")
    axis.set_ylabel("test accuracy (%)")
    axis.set_title(f"{title} ({hidden} of {len(every)} files below {least:.0f}%, not shown)" if hidden else title)
    axis.grid(alpha=0.3, which="both")
    axis.legend(loc="lower right", fontsize=8)
    return figure


def pareto_front(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """The points (bytes, accuracy) with a higher accuracy than every smaller one, by size.

    >>> pareto_front([(3, 0.5), (1, 0.4), (2, 0.6)])
    [(1, 0.4), (2, 0.6)]
    """
    front: list[tuple[int, float]] = []
    for size, accuracy in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or accuracy > front[-1][1]:
            front.append((size, accuracy))
    return front


def width_figure(fits: Mapping[str, Sequence[tuple[int, float, float]]], original: float | None) -> Figure:
    """Accuracy (%) and RMSE against the hidden width (arXiv 2407.00356, Fig. 1).

    Args:
        fits: Configuration name -> (width, accuracy, RMSE) of its fits.
        original: The original's accuracy; None if the fits have different originals.
    """
    figure = Figure(figsize=(9.0, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    _original_line(left, original)
    for name, points in fits.items():
        widths = [width for width, _, _ in points]
        left.plot(widths, [100 * accuracy for _, accuracy, _ in points], "o", label=literal_label(name))
        right.plot(widths, [rmse for _, _, rmse in points], "o", label=literal_label(name))
    for axis, label in ((left, "test accuracy (%)"), (right, "RMSE (weight units)")):
        axis.set_xlabel("hidden width")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    right.set_ylim(bottom=0)
    left.legend(loc="lower right", fontsize=8)
    return figure


def _original_line(axis: Axes, original: float | None) -> None:
    if original is not None:
        label = f"original {100 * original:.2f}%"
        axis.axhline(100 * original, color="black", linestyle="--", linewidth=1, label=label)
