"""The table and the figure of the study."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from matplotlib.figure import Figure
from rich import box
from rich.table import Table

from tests.benchmarks.study_images import paired


def study_tables(lines: list[dict[str, Any]], title: str) -> list[Table]:
    """How well the weights are explained, and what was measured on images; 80 columns wide at most."""
    names = dict.fromkeys(line["name"] for line in lines)
    fits = {name: [line for line in lines if line["name"] == name] for name in names}
    tables = [_table(title, ("parameters", "explained %", "seconds", "s to 90%", "fits"), fits, _explained)]
    others = {line["seed"]: line for line in lines if line["name"] == lines[0]["name"]}
    for of, prefix in (("On images", ""), ("On images, kept tensors calibrated", "calibrated_")):
        if all(f"{prefix}val_kl" in line for line in lines):
            columns = ("val KL", "val %", "test %", "val % - first (p)")
            tables.append(_table(of, columns, fits, partial(_measured, others=others, prefix=prefix)))
    return tables


def _table(
    title: str,
    columns: Sequence[str],
    fits: Mapping[str, list[dict[str, Any]]],
    cells: Callable[[list[dict[str, Any]]], list[str]],
) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("setting")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for name, same in fits.items():
        table.add_row(name, *cells(same))
    return table


def _spread(values: Sequence[float], digits: int) -> str:
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def _explained(fits: list[dict[str, Any]]) -> list[str]:
    reached = [next((s for s, share in line["curve"] if share >= 0.9), None) for line in fits]
    times = [s for s in reached if s is not None]
    return [
        f"{fits[0]['params']:,}",
        _spread([100 * line["explained_power"] for line in fits], 2),
        f"{statistics.mean(line['seconds'] for line in fits):.1f}",
        f"{statistics.mean(times):.1f}" if len(times) == len(fits) else "-",
        str(len(fits)),
    ]


def _measured(fits: list[dict[str, Any]], others: Mapping[int, dict[str, Any]], prefix: str) -> list[str]:
    figures = (("val_kl", 1, 3), ("val_acc", 100, 2), ("test_acc", 100, 2))
    cells = [_spread([factor * line[f"{prefix}{key}"] for line in fits], digits) for key, factor, digits in figures]
    pairs = [paired(line, others[line["seed"]], f"{prefix}val") for line in fits if line["seed"] in others]
    return [*cells, "\n".join(f"{100 * pair.difference:+.2f} ({pair.p_value:.1g})" for pair in pairs)]


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
