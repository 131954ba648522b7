"""What the fits of a sweep measured: a file `test.json` in the folder of each fit, and the table of all of them.

The table is always written again from the files of the folders, so that several processes can work on one sweep.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from nernlit.cli.sweep_plan import Sweep
from nernlit.cli.sweep_table import COLUMNS, Row, holds
from nernlit.errors import UsageError
from nernlit.storage.files import write_atomically, write_table

#: Name of the file.
RESULT = "test.json"
_ADVICE = "delete it, and the same command tests the fit again."


def is_finished(folder: Path) -> bool:
    """Whether the fit of a folder is finished and tested."""
    return (folder / RESULT).is_file()


def write_result(folder: Path, row: Row) -> None:
    """Write what a fit measured: all columns of the table but the folder, which may be moved."""
    write_atomically(folder / RESULT, json.dumps(row, indent=1, allow_nan=False).encode())


def read_results(out: Path) -> list[Row]:
    """The rows of all finished fits in the folder of a sweep, the oldest first.

    Raises:
        UsageError: If a file is damaged.
    """
    files = sorted(out.glob(f"*/version_*/{RESULT}"), key=lambda file: (file.stat().st_mtime_ns, file))
    return [_read(file) for file in files]


def _read(file: Path) -> Row:
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{file} cannot be read: {error}; {_ADVICE}") from error
    names = [name for name in COLUMNS if name != "folder"]
    if not isinstance(content, dict) or content.keys() != set(names):
        raise UsageError(f"{file} is not a result file of this version of nernlit; {_ADVICE}")
    for name in names:
        if type(value := content[name]) not in (str, int, float) or not holds(COLUMNS[name], str(value)):
            raise UsageError(f"{file}: {name} is {str(value)[:100]!r}, which is invalid; {_ADVICE}")
    return {name: content.get(name, str(file.parent)) for name in COLUMNS}


def tabulate(sweep: Sweep) -> list[Row]:
    """Write the table of all finished fits in the folder of a sweep, and return its rows.

    While it is written, other processes may finish fits and write it too. The last one that writes it then finds all
    results, because each reads them again afterwards.
    """
    written: list[Row] = []
    while (rows := read_results(sweep.out)) != written:
        write_table(sweep.table, rows)
        written = rows
    return written


def comparable(rows: Sequence[Row], sweep: Sweep) -> list[Row]:
    """The rows of fits with the options of a sweep, sorted: the newest of each configuration, width and seed.

    Fits of another version of a configuration's files are left out: than the one that the sweep has read, or than the
    newest row's for configurations that it has not.
    """
    common = {"select": sweep.select, "settings": sweep.settings}
    with_options = [row for row in rows if common.items() <= row.items()]
    files = {row["config"]: row["files"] for row in with_options} | sweep.files
    own = {
        (str(row["config"]), int(row["hidden"] or 0), int(row["seed"])): row
        for row in with_options
        if row["files"] == files[row["config"]]
    }
    return [own[key] for key in sorted(own)]
