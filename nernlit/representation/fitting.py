"""Whether new representations fit their predictor to the original; not if a file's predictor replaces it."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_FITTED: ContextVar[bool] = ContextVar("fitted", default=True)


def predictors_are_fitted() -> bool:
    """Whether the predictor of a representation that is built now is fitted."""
    return _FITTED.get()


@contextmanager
def without_fitting() -> Iterator[None]:
    """Build representations in the block without calling `Predictor.fit`, which may take minutes."""
    token = _FITTED.set(False)
    try:
        yield
    finally:
        _FITTED.reset(token)
