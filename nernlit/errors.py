"""User-fixable errors: the message says what was given, what was expected, and which option or call to change.

The command line prints the message of a `NernlitError` and exits with code 2; library users catch the class.
"""

import math
from typing import Any, get_args


class NernlitError(Exception):
    """Base class of all user-fixable errors."""


class LayoutError(NernlitError):
    """The selected layers, the kernels and the predictor's kernel size do not match."""


class CheckpointError(NernlitError):
    """A file of weights is missing, unreadable, or belongs to another network."""


class DataError(NernlitError):
    """A dataset is missing, truncated, or not in the expected layout."""


class UsageError(NernlitError):
    """An invalid option, or a combination of options that cannot work."""


class StorageError(NernlitError):
    """A file cannot be written: no space, no permission, or a failing disk."""


class DivergenceError(NernlitError):
    """A loss, a weight or a logit is not a finite number."""


class FileFormatError(NernlitError):
    """A .nern file is missing, damaged, of another version, or describes a network that cannot be built."""


def require_at_least(minimum: float, **options: float) -> None:
    """Check that options are finite and not below `minimum`.

    Raises:
        UsageError: If an option is not finite or is below `minimum`; the message names it.
    """
    for name, value in options.items():
        if not minimum <= value < math.inf:
            finite = " and a finite number" if value == math.inf else ""
            raise UsageError(f"{name}={value}; expected at least {minimum}{finite}.")


def require_one_of(choices: Any, **options: object) -> None:
    """Check that options have one of the values of a `Literal`.

    Args:
        choices: The `Literal`.
        options: Name of an option -> value.

    Raises:
        UsageError: If a value is another one; the message names the option.

    >>> from typing import Literal
    >>> require_one_of(Literal["mse", "rmse"], loss="rmse")
    """
    for name, value in options.items():
        if value not in get_args(choices):
            raise UsageError(f"{name}={value!r}; expected one of {', '.join(get_args(choices))}.")


def require_positive(**options: float) -> None:
    """Check that options are finite and above 0.

    Raises:
        UsageError: If an option is not; the message names it.
    """
    for name, value in options.items():
        if not 0 < value < math.inf:
            raise UsageError(f"{name}={value}; expected a finite number above 0.")
