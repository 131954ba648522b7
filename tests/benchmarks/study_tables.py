"""The table and the figure of the study."""

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

from matplotlib.figure import Figure
from rich.table import Table

from tests.benchmarks.study_images import paired


def study_table(lines: list[dict[str, Any]], title: str) -> Table:
    measured = (
        ("parameters", "val KL", "val %", "test %", "val, against the first setting") if "val_kl" in lines[0] else ()
    )
    table = Table(title=title, title_justify="left")
    for column in ("setting", "explained power %", "seconds", "seconds to 90%", "fits", *measured):
        table.add_column(column, justify="left" if column == "setting" else "right")
    for name in dict.fromkeys(line["name"] for line in lines):
        fits = [line for line in lines if line["name"] == name]
        explained = [100 * line["explained_power"] for line in fits]
        spread = f" ± {statistics.stdev(explained):.2f}" if len(fits) > 1 else ""
        reached = [next((s for s, share in line["curve"] if share >= 0.9), None) for line in fits]
        times = [s for s in reached if s is not None]
        table.add_row(
            name,
            f"{statistics.mean(explained):.2f}{spread}",
            f"{statistics.mean(line['seconds'] for line in fits):.1f}",
            f"{statistics.mean(times):.1f}" if len(times) == len(fits) else "-",
            str(len(fits)),
            *(_measured(fits, lines) if measured else ()),
        )
    return table


def _measured(fits: list[dict[str, Any]], lines: list[dict[str, Any]]) -> list[str]:
    """The cells of what was measured on images."""
    cells = [f"{fits[0]['params']:,}"]
    for key, factor, digits in (("val_kl", 1, 3), ("val_acc", 100, 2), ("test_acc", 100, 2)):
        values = [factor * line[key] for line in fits]
        spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
        cells.append(f"{statistics.mean(values):.{digits}f}{spread}")
    others = {line["seed"]: line for line in lines if line["name"] == lines[0]["name"]}
    pairs = [paired(line, others[line["seed"]], "val") for line in fits if line["seed"] in others]
    return [*cells, "; ".join(f"{100 * pair.difference:+.2f} ({pair.p_value:.1g})" for pair in pairs)]


def study_figure(lines: list[dict[str, Any]]) -> Figure:
    figure = Figure(figsize=(9, 6), layout="constrained")
    axis = figure.subplots()
    for number, name in enumerate(dict.fromkeys(line["name"] for line in lines)):
        style: Callable[..., Any] = partial(
            axis.plot, color=f"C{number % 10}", linestyle=("-", "--", ":")[number // 10 % 3]
        )
        for seed, line in enumerate(line for line in lines if line["name"] == name):
            seconds, explained = zip(*line["curve"], strict=True)
            style(seconds, [100 * share for share in explained], label=name if seed == 0 else None, linewidth=1)
    axis.set_xlabel("seconds in steps")
    axis.set_ylabel("explained power (%)")
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=7)
    return figure
