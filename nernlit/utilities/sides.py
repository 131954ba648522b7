"""Sizes of blocks: one number for a square, or a height and a width."""

from typing import Any

#: The side of a square, or (height, width).
Size = int | tuple[int, int]


def sides(size: Any) -> tuple[int, int]:
    """The (height, width) of a size.

    Raises:
        ValueError: If it is neither one nor two integers of at least 1; the message says what is expected.

    >>> sides(3), sides([1, 9])
    ((3, 3), (1, 9))
    """
    both = tuple(size) if isinstance(size, list | tuple) else (size, size)
    if len(both) != 2 or any(type(side) is not int or side < 1 for side in both):
        raise ValueError("expected an integer of at least 1, or two of them: [height, width]")
    return both


def shortest(height_width: tuple[int, int]) -> Size:
    """A size as files hold it: one number for a square.

    >>> shortest((3, 3)), shortest((1, 9))
    (3, (1, 9))
    """
    height, width = height_width
    return height if height == width else height_width
