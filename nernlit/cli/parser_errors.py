"""One-line versions of the option parser's messages: the option, its value, what was expected, close matches."""

import difflib
import inspect
import re
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import is_dataclass
from importlib import import_module
from typing import Any

from nernlit.utilities.trust import is_installed, is_refused, refusal, refused_name

_TYPES = {
    "PositiveInt": "a positive integer",
    "int": "an integer",
    "float": "a number",
    "bool": "true or false",
    "str": "a string",
    "NoneType": "null",
    "Sequence": "a list",
    "List": "a list",
}
_NOISE = re.compile(
    r"Does not validate against any|Subtypes:|Errors:|Expected a <class 'NoneType'>$|Given value type:|"
    r"Given value: (NestedArg|Namespace)"
)

_OF_BASE_CLASS = re.compile(r"\n *- Problem with given class_path '[^']+':\s+Option '([^']+)' is not accepted")


def explain(text: str, roots: Mapping[str, type], options: Iterable[str] = ()) -> str:
    """The parser's message in one line, with the option's name as a user writes it.

    Args:
        text: jsonargparse's message.
        roots: The classes that the top-level options `model`, `data`, ... take.
        options: The names of all top-level options, with dots.
    """
    # A value that the named class refuses is also tried for the base class, which does not have the option.
    text = _OF_BASE_CLASS.sub(lambda found: "" if f'Parser key "{found[1]}"' in text else found[0], text)
    keys: list[str] = []
    for key in re.findall(r'Parser key "([^"]+)"', text):  # each one's name is below the one before
        parts = [part for part in key.split(".") if part != "init_args"]
        keys += parts if keys[-len(parts) :] != parts else []
    classes = [
        found for pair in re.findall(r"class_path '([^']+)'|class_path='([^']+)'", text) for found in pair if found
    ]
    option = "--" + ".".join(keys)
    if (refused := refused_name(text)) is not None and is_installed(refused):
        return f"{option}: {refusal(refused)}" if keys else refusal(refused)
    if unknown := re.search(r"Option '([^']+)' is not accepted", text):
        known = _option_names(_imported(classes[-1])) if classes else []
        owner = f"{classes[-1].rpartition('.')[2]} has" if classes else "there is"
        return f"{option}.{unknown[1]}: {owner} no option {unknown[1]!r}; {_suggest(unknown[1], known)}"
    if unknown := re.search(r"unrecognized arguments: (\S+)", text):
        return _unrecognized(unknown[1], option if keys else "", classes, list(options))
    if unknown := re.search(r"Subcommand '\w+' does not accept option '([^']+)'", text):
        return _unrecognized(f"--{unknown[1]}", "", [], [*roots, "trainer", *options])
    if missing := re.search(r"arguments are required: (.+)", text):
        below = [name.strip() if keys else name.strip().partition(".")[2] for name in missing[1].split(",")]
        names = ", ".join(f"{option}.{name}" if keys else f"--{name}" for name in below)
        hint = "" if "." in names else " (-c CONFIG; `nernlit configs` lists the shipped ones)"
        return f"{names} must be given{hint}."
    if keys and keys[0] in roots and re.search(r"instantiatable class, but \S+ is abstract", text):
        names = ", ".join(found.__name__ for found in _subclasses(roots.get(keys[0], object)))
        return f"{option}: name a class, one of {names}, or pass a configuration: -c NAME."
    value = _value(text)
    if keys == ["trainer"]:
        return f"--trainer {value}: expected options of the trainer, such as --trainer.max_epochs 8."
    asks_for_class = re.search(
        r"import path|accessible or invalid|subclass|Unable to load config|callable class|has no attribute|unhashable|"
        r"is not iterable",
        text,
    )
    has_other_type = re.search(r"Expected a typing\.Literal|Expected an? <class '(?!NoneType)\w+'>", text)
    if asks_for_class and not has_other_type:
        return f"{option} {value}: {_classes_expected(option, value, _type_of(keys, classes, roots))}"
    allowed = [choice for found in re.findall(r"typing\.Literal\[([^\]]*)\]", text) for choice in found.split(", ")]
    allowed = list(dict.fromkeys(choice.strip("'") for choice in allowed))
    types = [
        _TYPES.get(name, "")
        for name in re.findall(r"(?:Expected an? (?:<class '(?:\w+\.)*|(?=Sequence|List))|Not of type )(\w+)", text)
    ]
    types += ["a list of two integers"] if "tuple[int, int]" in text else []
    types = [name for name in dict.fromkeys(types) if name not in ("", "null")]
    if keys and (allowed or types):
        expected = " or ".join([*([f"one of {', '.join(allowed)}"] if allowed else []), *types])
        return f"{option} {value}: expected {expected}{' or a class path' if asks_for_class and types else ''}."
    if asks_for_class and keys:
        return f"{option} {value}: invalid value for this option (see --help)."
    return _condensed(text)


def closest(name: str, known: Iterable[str]) -> list[str]:
    """The known names that are spelled most alike, at most three."""
    return difflib.get_close_matches(name, list(known), 3)


def _suggest(name: str, known: Iterable[str]) -> str:
    known = list(known)
    if close := closest(name, known):
        return f"did you mean {', '.join(close)}?"
    return f"it has {', '.join(each for each in known if '.' not in each)}." if known else "see --help."


def _option_names(owner: Any) -> list[str]:
    """The options of a class, and those of the dataclasses among them, as in `reconstruction.steps`."""
    names = []
    for name, parameter in _parameters(owner).items():
        group = _class_in(parameter.annotation)
        names += [name, *(f"{name}.{below}" for below in _parameters(group) if is_dataclass(group))]
    return names


def _unrecognized(argument: str, prefix: str, classes: Sequence[str], options: Sequence[str]) -> str:
    flag = argument.partition("=")[0]
    if not flag.startswith("-"):
        return f"{argument!r} is not an option; options are given as --name value (see --help)."
    name = flag.lstrip("-")
    if not prefix:
        known = list(dict.fromkeys(options))
        close = ", ".join(f"--{each}" for each in closest(name, known) or closest(name.partition(".")[0], known))
        return f"there is no option {flag}; {f'did you mean {close}?' if close else 'see --help.'}"
    *above, last = name.split(".")
    owner = _imported(classes[-1]) if classes else None
    if above and owner is not None and above[0] not in _parameters(owner):
        return (
            f"{prefix}.{name}: {owner.__name__} has no option {above[0]!r}; {_suggest(above[0], _option_names(owner))}"
        )
    owner = _follow(owner, above)
    named = getattr(owner, "__name__", ".".join(above) or prefix)
    return f"{prefix}.{name}: {named} has no option {last!r}; {_suggest(last, _option_names(owner))}"


def _value(text: str) -> str:
    given = re.findall(r"Given value: (?!NestedArg|Namespace)(.+)", text) or re.findall(
        r"Got value: (\S+?)\.?(?:\s|$)", text
    )
    given = given or re.findall(r"Expected a path but (.+) either not", text)
    given = given or re.findall(r"Unable to load config ['\"](.+?)['\"]", text)
    value = str(given[0]).strip() if given else ""
    path = re.match(r"Namespace\(class_path='([^']+)'", value)
    return path[1] if path else value


def _classes_expected(option: str, value: str, base: Any) -> str:
    """What an option that takes a class expects, and why the given value is none."""
    reason = _why_unusable(value)
    because = f"{reason}; " if reason else ""
    if not isinstance(base, type):
        example = "torch.optim.lr_scheduler.StepLR" if "scheduler" in option else "torch.optim.Adam"
        return f"{because}expected the path of a class that this option takes, such as {example}."
    names = [found.__name__ for found in _subclasses(base)]
    if not names or names == [base.__name__]:
        return f"{because}expected the options of {base.__name__}: {', '.join(_parameters(base))}."
    close = closest(value, names)
    meant = f"[{value}], a list" if value in names else close[0] if close else ""
    hint = f" (did you mean {meant}?)" if meant else ""
    return (
        f"{because}expected one of {', '.join(names)}{hint}, or the path of a class of your own (module.Class) that "
        f"derives from {base.__name__}."
    )


def _why_unusable(class_path: str) -> str:
    """The reason why a class with a dotted path cannot be imported; empty if it can."""
    module, _, name = class_path.rpartition(".")
    if not re.fullmatch(r"[A-Za-z_][\w.]*", module):
        return ""
    if is_refused(class_path):
        return refusal(class_path)
    try:
        return "" if hasattr(import_module(module), name) else f"{module} has no {name}"
    except Exception as error:  # a user's module may raise anything
        return f"{module} cannot be imported ({type(error).__name__}: {error})"


def _subclasses(base: type) -> list[type]:
    """Every class of this package that can be constructed, by name."""
    found, waiting = set(), [base]
    while waiting:
        each = waiting.pop()
        waiting += each.__subclasses__()
        if not inspect.isabstract(each) and each.__module__.startswith("nernlit.") and each.__name__[0] != "_":
            found.add(each)
    return sorted(found, key=lambda each: each.__name__)


def _type_of(keys: Sequence[str], classes: Sequence[str], roots: Mapping[str, type]) -> Any:
    """The class that an option accepts, according to its annotation."""
    if not keys or keys[0] not in roots:
        return None
    if len(keys) == 1:
        return roots[keys[0]]
    return _follow(_imported(classes[0]) if classes else roots[keys[0]], keys[1:])


def _follow(owner: Any, names: Sequence[str]) -> Any:
    for name in names:
        parameter = _parameters(owner).get(name.rstrip("+"))
        owner = _class_in(parameter.annotation) if parameter is not None else None
    return owner


def _class_in(annotation: Any) -> Any:
    """The first class of ours in an annotation such as `X | None` or `Sequence[X]`."""
    if isinstance(annotation, type) and annotation.__module__.startswith("nernlit."):
        return annotation
    return next((found for part in typing.get_args(annotation) if (found := _class_in(part)) is not None), None)


def _parameters(owner: Any) -> dict[str, inspect.Parameter]:
    """The options of a class; `**kwargs` stand for those of the class that it derives from."""
    if not isinstance(owner, type):
        return {}
    found: dict[str, inspect.Parameter] = {}
    for each in owner.__mro__:
        if "__init__" not in vars(each):
            continue
        own = inspect.signature(each).parameters if each is not object else {}
        found = {**{k: v for k, v in own.items() if v.kind not in (v.VAR_KEYWORD, v.VAR_POSITIONAL)}, **found}
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in own.values()):
            break
    return found


def _imported(class_path: str) -> Any:
    module, _, name = class_path.rpartition(".")
    if not module or is_refused(class_path):
        return None
    try:
        return getattr(import_module(module), name, None)
    except Exception:  # a user's module may raise anything
        return None


def _condensed(text: str) -> str:
    """The parser's tree of alternatives in one line, without those that do not apply."""
    lines = [line.strip(" -") for line in text.splitlines()]
    kept = [line for line in lines if line and not _NOISE.match(line)]
    return re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", " ".join(kept)) + " (--print_config shows every option)"
