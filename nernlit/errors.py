"""Errors that name what was given, what was expected, and the flag or call that mends it.

The command line prints the message of a `NernlitError` and exits with code 2; a library user catches the class.
"""

import math


class NernlitError(Exception):
    """Base of every error that a user can mend."""


class LayoutError(NernlitError):
    """The chosen layers, the kernels or the predictor's kernel size do not fit each other."""


class CheckpointError(NernlitError):
    """A file of weights is missing, unreadable, or belongs to another network."""


class DataError(NernlitError):
    """A dataset is missing, truncated or wrongly laid out."""


class UsageError(NernlitError):
    """A combination of options that cannot work."""


class StorageError(NernlitError):
    """A file cannot be written: no space, no permission, or a failing disk."""


class DivergenceError(NernlitError):
    """A loss, a weight or a logit is not a finite number."""


class FileFormatError(NernlitError):
    """A .nern file is missing, damaged, of another version, or describes what cannot be built."""


def require_at_least(least: float, **options: float) -> None:
    """Refuse options that are smaller, or not finite.

    Raises:
        UsageError: If one is; names it.
    """
    for name, value in options.items():
        if not least <= value < math.inf:
            finite = " and a finite number" if value == math.inf else ""
            raise UsageError(f"{name}={value}; expected at least {least}{finite}.")


def require_positive(**options: float) -> None:
    """Refuse options that are 0, negative or not finite.

    Raises:
        UsageError: If one is; names it.
    """
    for name, value in options.items():
        if not 0 < value < math.inf:
            raise UsageError(f"{name}={value}; expected a finite number above 0.")
