"""Which modules configurations, options and checkpoints may import: importing a class runs the code of its module."""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.machinery import ModuleSpec, all_suffixes
from importlib.util import find_spec
from pathlib import Path

from jsonargparse import set_parsing_settings

# jsonargparse has no public way to take a restriction back, and settings are those of the whole process.
from jsonargparse._common import parsing_settings

#: Packages whose classes and functions may be named, beside the modules of the working directory.
PACKAGES = ("nernlit", "torch", "timm", "lightning", "torchmetrics", "torchvision", "ranger21")

_trusted = ContextVar("trusted", default=False)
#: Names of modules and classes that may be imported now; None while everything may.
_known: ContextVar[frozenset[str] | None] = ContextVar("known", default=None)


@contextmanager
def trusting() -> Iterator[None]:
    """Inside, `known_names_only` restricts nothing: any installed module may be imported by its name."""
    token = _trusted.set(True)
    try:
        yield
    finally:
        _trusted.reset(token)


@contextmanager
def known_names_only(more: Iterable[str] = ()) -> Iterator[None]:
    """Inside, parsers import nothing but what is in PACKAGES, in the working directory, or in `more`.

    Everything else is refused before it is imported; `refused_name` finds it in the parser's message.

    Args:
        more: Dotted paths of further modules or classes.
    """
    if _trusted.get():
        yield
        return
    known = frozenset((*PACKAGES, *_own_modules(), *(name for name in more if _is_dotted(name))))
    before, token = dict(parsing_settings), _known.set(known | (_known.get() or frozenset()))
    set_parsing_settings(
        import_path_denylist=["*"],
        import_path_allowlist=sorted(known),
        instantiate_subclass_spec_in_any=False,  # an option of any type stays the value that it is
    )
    try:
        yield
    finally:
        parsing_settings.update(before)
        _known.reset(token)


def is_refused(name: str) -> bool:
    """Whether a dotted path is that of an installed module that may not be imported now."""
    known, parts = _known.get(), name.split(".")
    if known is None or any(".".join(parts[:end]) in known for end in range(1, len(parts) + 1)):
        return False
    return is_installed(name)


def refused_name(text: str) -> str | None:
    """The dotted path that a parser refused to import, from its message; None if there is none."""
    found = re.search(r"Importing '([^']+)' is not allowed", text)
    return found[1] if found else None


def is_installed(name: str) -> bool:
    """Whether there is a module for a dotted path; nothing is imported."""
    return _spec(name.partition(".")[0]) is not None


def refusal(name: str) -> str:
    """Why a name is refused, and what to do, for a message."""
    if not is_installed(name):
        return f"there is no module {name.partition('.')[0]!r}."
    packages = f"{', '.join(PACKAGES[:-1])} and {PACKAGES[-1]}"
    return (
        f"{name} is refused, since importing it would run its code: it is outside {packages}, and not in the working "
        "directory. Pass --trust if you trust it."
    )


def _own_modules() -> Iterator[str]:
    """Names of the modules and packages in the working directory that an import finds there."""
    folder = Path.cwd()
    for path in folder.iterdir():
        name = path.name.partition(".")[0]
        is_module = path.is_dir() or any(path.name == name + suffix for suffix in all_suffixes())
        if is_module and name.isidentifier() and name != "jsonargparse" and _lies_in(folder, name):
            yield name


def _lies_in(folder: Path, name: str) -> bool:
    spec = _spec(name)
    if spec is None:
        return False
    places = spec.submodule_search_locations or ([spec.origin] if spec.has_location and spec.origin else [])
    return bool(list(places)) and all(Path(place).resolve().parent == folder.resolve() for place in places)


def _spec(name: str) -> ModuleSpec | None:
    """How a module without dots in its name would be imported; nothing is."""
    try:
        return find_spec(name)
    except (ImportError, ValueError):  # it is imported, and does not say from where
        return None


def _is_dotted(name: str) -> bool:
    return all(part.isidentifier() for part in name.split("."))
