"""Tables keep every number whole, whatever the width."""

import io
import re

import pytest
from rich.console import Console

from nernlit.utilities.tables import print_table

NUMBERS = [
    ["2.047e-11", "-1.234e+308", "97.22% ±0.31%", "160000"],
    ["1.000", "-0.0001234", "100.00%", "3"],
]
COLUMNS = ["weights", "p_value", "difference from the original", "accuracy", "n"]


def _printed(width: int, columns: list[str], rows: list[list[str]], names: int = 1) -> str:
    console = Console(file=io.StringIO(), width=width)
    print_table("smooth: runs/cifar100_h680_teacher_progressive/version_12, test images", columns, rows, names, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "…" not in text
    return str(text)


@pytest.mark.parametrize("width", [5, 20, 40, 60, 80, 200])
@pytest.mark.parametrize("name", ["a", "lower half of SVD -10%", "stages.3.blocks.12.conv_depthwise"])
def test_every_number_is_whole_at_every_width(width: int, name: str) -> None:
    text = _printed(width, COLUMNS, [[name, *row] for row in NUMBERS])
    for number in [cell for row in NUMBERS for cell in row]:
        assert re.search(rf"(?<!\S){re.escape(number)}(?!\S)", text), number
    title, *lines = text.splitlines()
    assert title.endswith("version_12, test images")
    if width >= 60:
        assert max(map(len, lines)) <= width


def test_a_table_that_fits_is_not_folded() -> None:
    text = _printed(80, ["figure", "value"], [["original accuracy", "88.38%"], ["RMSE (weight units)", "0.01234"]])
    header, rule, *rows = [re.split(r" {2,}", line.strip()) for line in text.splitlines()[1:]]
    assert set("".join(rule)) == {"─"}
    # How many spaces there are differs between versions of rich.
    assert [header, *rows] == [["figure", "value"], ["original accuracy", "88.38%"], ["RMSE (weight units)", "0.01234"]]


def test_names_are_folded_before_headers_and_headers_before_rows_become_lists() -> None:
    long = "cifar100_h680_teacher_progressive"
    rows = [[long, "1.234e-05", "0.9722"]]
    columns = ["configuration", "p", "explained power"]
    wide = _printed(80, columns, rows)
    assert long in wide
    folded = _printed(45, columns, rows)
    assert long not in folded.split("\n", 1)[1]
    assert "explained power" in folded
    narrow = _printed(33, columns, rows)
    assert "explained power" not in narrow
    assert "1.234e-05" in narrow
    assert "p: 1.234e-05\nexplained power: 0.9722" in _printed(20, columns, rows)


def test_a_table_without_names_has_numbers_only() -> None:
    text = _printed(80, ["x", "y", "loss"], [["-1", "0.5", "2.303"]], names=0)
    assert text.splitlines()[-1].split() == ["-1", "0.5", "2.303"]
