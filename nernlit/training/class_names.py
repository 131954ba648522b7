"""The names of classes: those of the data are given to a network that has none, and compared with those it has."""

from collections.abc import Iterable
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from nernlit.errors import DataError
from nernlit.originals import Original
from nernlit.utilities.text import abbreviated

_SHOWN = 4


def class_names(data: Any) -> tuple[str, ...]:
    """The names of a data module's classes, whatever type its `classes` has; empty if there are none.

    >>> from types import SimpleNamespace
    >>> class_names(SimpleNamespace(classes=range(3))), class_names(SimpleNamespace(classes=10)), class_names(None)
    (('0', '1', '2'), (), ())
    """
    classes = getattr(data, "classes", None)
    return tuple(map(str, classes)) if isinstance(classes, Iterable) and not isinstance(classes, str) else ()


def take_class_names(original: Original, data: Any) -> None:
    """Give a network without class names those of the data. Others are kept: they say what its logits mean.

    Args:
        original: The network.
        data: The datamodule, or None.

    Raises:
        DataError: If the data has the same names in another order.
    """
    names, known = class_names(data), original.class_names
    if len(names) != original.num_classes or names == known:
        return
    given, own = abbreviated(names, _SHOWN), abbreviated(known, _SHOWN)
    if not known:
        original.class_names = names
    elif set(names) == set(known):
        raise DataError(
            f"the classes of the data are in another order ({given}) than the network's ({own}), "
            "so the labels would be wrong; rename the folders or sort the classes."
        )
    else:
        rank_zero_warn(
            f"the classes of the data ({given}) are not named as the network's ({own}). Accuracies "
            "are right only if the classes are the same, in the same order."
        )
