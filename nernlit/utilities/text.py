"""Parts of messages."""

from collections.abc import Sequence


def abbreviated(names: Sequence[str], shown: int = 5) -> str:
    """The names in one line, the first ones of many.

    >>> abbreviated(["a", "b", "c"], shown=2)
    'a, b and 1 more'
    """
    rest = len(names) - shown
    return ", ".join(names) if rest <= 0 else f"{', '.join(names[:shown])} and {rest} more"
