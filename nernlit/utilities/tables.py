"""Tables of numbers for a terminal of any width. Names may be wrapped; numbers are never truncated."""

from collections.abc import Sequence

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

_NAME_WIDTH = 10  # smallest width to which names are wrapped
_HEADER_WIDTH = 5  # smallest width to which headers of numbers are wrapped
_GAP = 2  # between two columns


def print_table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    names: int = 1,
    console: Console | None = None,
) -> None:
    """Print a table that fits the console.

    If the table is too wide, names are wrapped, then headers. If it is still too wide, every row is printed as a list
    of `header: value` lines.

    Args:
        title: Printed above.
        columns: Headers.
        rows: Cells, one per column.
        names: How many columns, from the left, hold names; all others hold numbers.
        console: Where to; standard output by default.
    """
    console = console or Console()
    console.print(Text(title, style="bold"), soft_wrap=True)
    widths = _widths(columns, rows, names, console.width)
    if widths is None:
        lines = ["\n".join(f"{head}: {cell}" for head, cell in zip(columns, row, strict=True)) for row in rows]
        console.print(Text("\n\n".join(lines)), soft_wrap=True)
        return
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, _GAP - 1, 0, 0))
    for number, (head, width) in enumerate(zip(columns, widths, strict=True)):
        is_name = number < names
        table.add_column(
            Text(head, overflow="fold", no_wrap=False),
            justify="left" if is_name else "right",
            overflow="fold",
            no_wrap=not is_name,
            width=width,
        )
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table)


def _widths(columns: Sequence[str], rows: Sequence[Sequence[str]], names: int, available: int) -> list[int] | None:
    """The widths of the columns; None if the table is too wide even with all names and headers wrapped."""
    room = available - _GAP * len(columns)
    cells = [max((cell_len(row[number]) for row in rows), default=0) for number in range(len(columns))]
    heads = [cell_len(head) for head in columns]
    whole = [max(pair) for pair in zip(cells, heads, strict=True)]
    folded_names = [min(width, _NAME_WIDTH) for width in whole[:names]]
    folded_heads = [max(cell, min(head, _HEADER_WIDTH)) for cell, head in zip(cells, heads, strict=True)][names:]
    for least in ([*folded_names, *whole[names:]], [*folded_names, *folded_heads]):
        if sum(least) <= room:
            return _widened(least, whole, room)
    return None


def _widened(least: Sequence[int], whole: Sequence[int], room: int) -> list[int]:
    """The least widths, with the free room given to the columns that are furthest below their full width."""
    widths = list(least)
    for _ in range(room - sum(widths)):
        lacks = [full - width for full, width in zip(whole, widths, strict=True)]
        if max(lacks) <= 0:
            break
        widths[lacks.index(max(lacks))] += 1
    return widths
