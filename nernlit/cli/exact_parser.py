"""The option parser of `fit`, `validate`, `test` and `predict`."""

import re
from collections.abc import Sequence
from typing import Any, final

from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser

#: None as a value: alone, or in a list or a mapping.
_NONE = re.compile(r"(?:^|(?<=[=\[])|(?<=[:,] ))None(?=[,\]}]|$)")


@final
class ExactParser(LightningArgumentParser):
    """A parser without abbreviated options. The options of nested classes have parsers of this class too.

    jsonargparse passes values to nested parsers as `str(value)`, which turns null into the text `None`. This class
    turns it back, so that `--model.representation.quantize null` works.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def parse_args(  # type: ignore[override]  # the other parameters are jsonargparse's own
        self, args: Sequence[str] | None = None, *others: Any, **options: Any
    ) -> Namespace:
        given = None if args is None else [_NONE.sub("null", arg) for arg in args]
        return super().parse_args(given, *others, **options)
