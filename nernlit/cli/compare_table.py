"""The table of `nernlit compare`: one row per file as CSV, on the screen, and as a figure."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from nernlit.analysis import pareto_figure
from nernlit.cli.rivals import SETTINGS, rival_name
from nernlit.cli.sweep_table import Column, Row, finite, whole
from nernlit.errors import UsageError
from nernlit.utilities.tables import print_table

#: Columns: `original` is the fingerprint of its weights; `data` and `options` are as on the command line.
COLUMNS: dict[str, Column] = {
    **dict.fromkeys(("method", "file", "original", "data", "options"), str),
    **dict.fromkeys(("bytes", "original_bytes"), whole),
    **dict.fromkeys(("setting", "acc_original", "acc", "fit_seconds"), finite),
    **dict.fromkeys(("difference", "difference_low", "difference_high", "p_value"), finite),
}


def require_same(row: Row, expected: Mapping[str, str], table: Path) -> None:
    """Check that a row of an existing table belongs to the same comparison.

    Raises:
        UsageError: With what differs.
    """
    for name, value in expected.items():
        if row[name] != value:
            raise UsageError(
                f"{table}: {row['file']} was written with {name} {str(row[name])!r}, and now {value!r} is given; "
                "files can be compared only if both are equal. Pass another folder as --out."
            )


def with_row(rows: Sequence[Row], row: Row) -> list[Row]:
    """The rows with another one, which replaces that of the same method and setting."""
    kept = [r for r in rows if (r["method"], float(r["setting"])) != (row["method"], float(row["setting"]))]
    return [*kept, row]


def _methods(rows: Sequence[Row]) -> list[str]:
    """The methods of the rows: those of this program first."""
    names = {str(row["method"]) for row in rows}
    return [*(name for name in SETTINGS if name in names), *sorted(names - SETTINGS.keys())]


def print_rows(rows: Sequence[Row]) -> None:
    """A line per file: its size, and its accuracy with the 95% interval of the difference from the original's."""
    lines, methods = [], _methods(rows)
    for row in sorted(rows, key=lambda row: (methods.index(str(row["method"])), -float(row["bytes"]))):
        size, acc, difference, p_value = (float(row[n]) for n in ("bytes", "acc", "difference", "p_value"))
        lines.append(
            [
                rival_name(str(row["method"]), float(row["setting"])),
                f"{size:,.0f}",
                f"{size / float(row['original_bytes']):.1%}",
                f"{acc:.2%}",
                f"{100 * difference:+.2f} ± {100 * (float(row['difference_high']) - difference):.2f}",
                "<0.001" if p_value < 0.001 else f"{p_value:.3f}",
                f"{float(row['fit_seconds']):.0f}",
            ]
        )
    original_bytes, accuracy = int(rows[0]["original_bytes"]), float(rows[0]["acc_original"])
    title = f"test images (original: {original_bytes:,} bytes, {accuracy:.2%}; ± is the 95% interval)"
    print_table(title, ["file", "bytes", "size", "acc", "difference", "p", "fit s"], lines)


def rows_figure(rows: Sequence[Row], name: str) -> Figure:
    """Accuracy against the bytes of the files.

    Args:
        rows: Of the files.
        name: The network's, or its file's.
    """
    files = {
        method: [(int(row["bytes"]), float(row["acc"])) for row in rows if row["method"] == method]
        for method in _methods(rows)
    }
    original = int(rows[0]["original_bytes"]), float(rows[0]["acc_original"])
    return pareto_figure(files, original, Path(name).name)
