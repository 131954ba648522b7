"""Functions compiled by numba. Import this module where they are called: numba takes half a second to import."""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba

from nernlit.utilities.progress import progress

_Function = TypeVar("_Function", bound=Callable[..., Any])


def jit_helper(function: _Function) -> _Function:
    """Decorator for functions that are called by compiled functions; they are compiled together."""
    return cast(_Function, numba.njit(function))


def compiled(function: Callable[..., Any], what: str, *example: Any) -> Callable[..., Any]:
    """A compiled function: from numba's cache, or compiled again if the cache is damaged or cannot be written.

    Args:
        function: A function that numba can compile.
        what: What it computes, such as "the order", for the message of a long compilation.
        example: Arguments of a short call; other calls have arguments of the same types.
    """
    with progress(f"compiling {what}, once", 1):
        try:
            fast: Callable[..., Any] = numba.njit(cache=True, nogil=True)(function)
            fast(*example)  # reads the cache
        except Exception:  # from pickle, the file system or numba, which does not validate its cache files
            fast = numba.njit(nogil=True)(function)
    return fast
