"""The table of a sweep: one row per fit as CSV, one line per configuration and width on the screen."""

import csv
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from nernlit.cli.sweep_plan import Fit
from nernlit.errors import UsageError
from nernlit.utilities.tables import print_table

Row = dict[str, float | str]

#: The columns that identify a fit.
KEYS = ("config", "seed", "select", "settings", "asked_hidden", "files")
#: Measured columns.
_MEASURED = (
    *("cr_paper", "cr_file", "acc_original", "acc", "recon_rmse", "explained_power"),
    *("difference", "difference_low", "difference_high", "p_value"),
    *("fit_seconds", "steps_per_second", "peak_memory_mib"),
)
_SHOWN = {
    "cr_paper": ("CR", "{:.1%}"),
    "cr_file": ("file", "{:.1%}"),
    "acc_original": ("original", "{:.2%}"),
    "acc": ("acc", "{:.2%}"),
    "difference": ("diff", "{:+.2%}"),
    "recon_rmse": ("RMSE", "{:.4f}"),
    "fit_seconds": ("fit s", "{:.0f}"),
    "peak_memory_mib": ("MiB", "{:.0f}"),
}


#: What a column may hold: raises `ValueError` for other texts.
Column = Callable[[str], object]


def finite(text: str) -> float:
    """A column of finite numbers."""
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text} is not finite")
    return value


def whole(text: str) -> int:
    """A column of integers of at least 1."""
    if (value := int(text)) < 1:
        raise ValueError(f"{text} is less than 1")
    return value


def _from_zero(text: str) -> int:
    if (value := int(text)) < 0:
        raise ValueError(f"{text} is negative")
    return value


def _whole_or_empty(text: str) -> int | None:
    return whole(text) if text else None


#: All columns, and what each may hold.
COLUMNS: dict[str, Column] = {
    **dict.fromkeys((*KEYS, "folder", "host"), str),
    "seed": _from_zero,
    "asked_hidden": _whole_or_empty,
    "hidden": _whole_or_empty,  # a predictor of one's own may have no width
    **dict.fromkeys(_MEASURED, finite),
}


def read_rows(
    path: Path,
    columns: Mapping[str, Column] = COLUMNS,
    advice: str = "move it away, or pass another folder as --out.",
) -> list[Row]:
    """The fits that a table holds; none where there is no table.

    Args:
        path: The file.
        columns: Its columns, and what each may hold.
        advice: What to do about a file that is no such table.

    Raises:
        UsageError: If the file is no such table, or a row of it is damaged.
    """
    if not path.exists():
        return []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file, strict=True)
            if set(reader.fieldnames or ()) != set(columns):
                raise UsageError(f"{path} is not a table of this version of nernlit; {advice}")
            rows: list[Row] = []
            for row in reader:
                place = f"{path}, line {reader.line_num}"
                if None in row or None in row.values():
                    raise UsageError(f"{place}: expected {len(columns)} values; {advice}")
                for name, column in columns.items():
                    if not holds(column, row[name]):
                        raise UsageError(f"{place}: {name} is {row[name][:100]!r}, which is invalid; {advice}")
                rows.append(dict(row))
    except (OSError, ValueError, csv.Error) as error:
        raise UsageError(f"{path} is no table of fits: {error}; {advice}") from error
    return rows


def holds(column: Column, text: str) -> bool:
    """Whether a text is one that a column may hold."""
    try:
        column(text)
    except ValueError:
        return False
    return True


def common_original(rows: Sequence[Row]) -> float | None:
    """The original's accuracy; None where the fits have different originals."""
    accuracies = {float(row["acc_original"]) for row in rows}
    return accuracies.pop() if len(accuracies) == 1 else None


def print_summary(rows: Sequence[Row], failed: Mapping[Fit, str]) -> None:
    """A line per configuration and width: the mean over seeds, with the standard deviation where there are several.

    Args:
        rows: Of the fits that finished.
        failed: Those that did not, and why.
    """
    original = common_original(rows)
    shown = {name: how for name, how in _SHOWN.items() if name != "acc_original" or (rows and original is None)}
    lines = []
    for config, hidden in dict.fromkeys((str(row["config"]), str(row["hidden"])) for row in rows):
        own = [row for row in rows if (row["config"], row["hidden"]) == (config, hidden)]
        cells = []
        for name, (_, form) in shown.items():
            values = [float(row[name]) for row in own]
            spread = f" ±{form.format(statistics.stdev(values))}" if len(values) > 1 and name == "acc" else ""
            cells.append(form.format(statistics.fmean(values)) + spread)
        lines.append([config, hidden, *cells])
    for fit in failed:
        cells = ["failed" if name == "acc" else "-" for name in shown]
        lines.append([f"{Path(fit.config).stem}, seed {fit.seed}", str(fit.hidden or ""), *cells])
    title = "test" if original is None else f"test (original {original:.2%})"
    print_table(title, ["config", "H", *(head for head, _ in shown.values())], lines)
    for fit, message in failed.items():
        print(f"failed: {fit.name}: {message}")
