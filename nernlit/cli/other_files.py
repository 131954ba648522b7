"""Files of other programs for `nernlit compare --others`."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import final

from nernlit.cli.rivals import SETTINGS
from nernlit.cli.sweep_table import Column, finite, read_rows
from nernlit.errors import UsageError

_COLUMNS: dict[str, Column] = {**dict.fromkeys(("method", "file", "weights"), str), "setting": finite}


@final
@dataclass(frozen=True)
class OtherFile:
    """A network that another program compressed.

    Attributes:
        method: Name of the program or of its method.
        setting: A number that tells its files apart, such as bits.
        file: The compressed file; only its size is read.
        weights: File of the weights that the other program decoded from it.
    """

    method: str
    setting: float
    file: Path
    weights: Path

    @property
    def stem(self) -> str:
        return f"{self.method}_{self.setting:g}"


def read_other_files(table: Path) -> list[OtherFile]:
    """The files that a table lists: CSV with the columns `method`, `setting`, `file` and `weights`.

    Args:
        table: The table. Paths in it are relative to its folder.

    Raises:
        UsageError: If the table is invalid or empty, lists a file that is missing or listed twice, or uses the name of
            one of nernlit's methods.
    """
    columns = "a CSV with the columns method, setting (a number), file and weights"
    if not table.is_file():
        raise UsageError(f"--others {table}: there is no such file; expected {columns}.")
    files = [
        OtherFile(
            str(row["method"]),
            float(row["setting"]),
            table.parent / str(row["file"]),
            table.parent / str(row["weights"]),
        )
        for row in read_rows(table, _COLUMNS, f"expected {columns}.")
    ]
    if not files:
        raise UsageError(f"--others {table} lists no file; expected {columns}.")
    for number, each in enumerate(files):
        if each.method in SETTINGS or not re.fullmatch(r"\w[\w.-]*", each.method):
            raise UsageError(
                f"--others {table}: method {each.method!r}; expected a name of letters, digits, '_', '-' and '.' that "
                f"is none of {', '.join(SETTINGS)}."
            )
        if each.stem in [other.stem for other in files[:number]]:
            raise UsageError(f"--others {table}: {each.method} {each.setting:g} is listed twice; leave one out.")
        for path in (each.file, each.weights):
            if not path.is_file():
                raise UsageError(f"--others {table}: there is no file {path}; paths are relative to the table.")
    return files
