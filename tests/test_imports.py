"""Who may import whom: the order of the house, checked on the source."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import nernlit
from nernlit.__main__ import HELP

ROOT = Path(nernlit.__file__).parent

#: Part of the package -> the parts that it may import.
_PLAIN = {"constants", "errors", "files", "file_kinds", "progress", "sharing", "tables"}
ALLOWED = {
    "errors": set(),
    "files": {"errors"},
    "progress": set(),
    "constants": set(),
    "tables": set(),
    "sharing": set(),
    "signals": set(),
    "file_kinds": set(),
    "cpu": set(),
    "kernels": _PLAIN,
    "predictors": _PLAIN,
    "container": _PLAIN,
    "originals": {"container", *_PLAIN},
    "losses": _PLAIN,
    "optimisers": _PLAIN,
    "specification": set(),
    "sizes": {"sharing"},
    "representation": {"sizes", "specification", *_PLAIN, "kernels", "predictors", "originals", "losses"},
    "nern": {*_PLAIN, "container", "kernels", "originals", "predictors", "representation"},
    "analysis": {*_PLAIN, "kernels", "predictors", "originals", "losses", "representation"},
    "checkpoint": {*_PLAIN, "representation"},
    "modules": {"checkpoint", *_PLAIN, "kernels", "predictors", "originals", "losses", "optimisers", "representation"},
    "data": _PLAIN,
    "callbacks": {
        "checkpoint",
        "cpu",
        "signals",
        "specification",
        *_PLAIN,
        "analysis",
        "originals",
        "predictors",
        "representation",
    },
    "base_files": _PLAIN,
    "arguments": _PLAIN,
    "parser_errors": set(),
    "cli": {"cpu", "parser_errors", *_PLAIN, "trainer_cli"},
    "trainer_cli": {
        "arguments",
        "base_files",
        "parser_errors",
        *_PLAIN,
        "kernels",
        "predictors",
        "optimisers",
        "modules",
        "data",
        "callbacks",
        "config_paths",
        "fitted_options",
        "resume",
        "run_folders",
        "runs",
    },
    "resume": {*_PLAIN, "checkpoint"},
    "run_folders": _PLAIN,
    "fitted_options": {*_PLAIN, "resume", "specification"},
    "config_paths": {*_PLAIN, "resume", "runs"},
    "runs": {"base_files", *_PLAIN, "checkpoint", "data", "representation"},
    "sweep_table": _PLAIN,
    "sweep": {"signals", "arguments", "sweep_table", "base_files", *_PLAIN, "analysis", "cli", "modules"},
    "analyses": {*_PLAIN, "analysis", "representation", "runs"},
    "analyze": {"arguments", *_PLAIN, "analyses", "runs"},
    "report": {"arguments", *_PLAIN, "analysis", "representation", "runs"},
    "export": {"arguments", *_PLAIN, "callbacks", "container", "data", "modules", "nern", "runs"},
    "__main__": {"cli", "signals"},
    "__init__": {"data", "kernels", "modules", "nern", "originals", "predictors", "representation", "sizes"},
}
WITHOUT_LIGHTNING = {
    "container",
    "nern",
    "signals",
    "errors",
    "files",
    "progress",
    "constants",
    "sharing",
    "file_kinds",
    "cpu",
    "kernels",
    "predictors",
    "originals",
    "losses",
    "optimisers",
    "specification",
    "sizes",
    "representation",
    "checkpoint",
    "analysis",
}


def _imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} if node.module != "nernlit" else {f"nernlit.{alias.name}" for alias in node.names}
    return names


def _parts() -> dict[str, set[str]]:
    parts: dict[str, set[str]] = {}
    for path in ROOT.rglob("*.py"):
        part = path.relative_to(ROOT).parts[0].removesuffix(".py")
        parts.setdefault(part, set()).update(_imports(path))
    return parts


def test_every_part_imports_only_what_stands_below_it() -> None:
    for part, imported in _parts().items():
        own = {name.split(".")[1] for name in imported if name.startswith("nernlit.")} - {part, "__version__"}
        assert own <= ALLOWED[part], f"nernlit.{part} imports {sorted(own - ALLOWED[part])}"


def test_there_is_no_lightning_below_the_modules() -> None:
    for part, imported in _parts().items():
        if part in WITHOUT_LIGHTNING:
            assert not [name for name in imported if name.split(".")[0] == "lightning"], f"nernlit.{part}"


def test_the_package_and_its_overview_do_not_wait_for_torch() -> None:
    code = "import sys, nernlit.__main__; sys.argv[1:] = ['--help']; nernlit.__main__.main()"
    checked = f"import atexit, sys; atexit.register(lambda: print('torch' in sys.modules)); {code}"
    done = subprocess.run([sys.executable, "-c", checked], capture_output=True, text=True, check=True)
    assert done.stdout == f"{HELP}False\n"


def test_every_public_name_is_found_on_first_use() -> None:
    for name in nernlit.__all__:
        assert getattr(nernlit, name).__name__ == name
    with pytest.raises(AttributeError, match="'nernlit' has no attribute 'Predicter'"):
        nernlit.Predicter  # noqa: B018
