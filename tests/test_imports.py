"""Allowed imports between subpackages, checked on the source code."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import nernlit
from nernlit.__main__ import HELP

ROOT = Path(nernlit.__file__).parent

#: Part of the package -> the parts that it may import. Read from top to bottom: nothing imports upwards.
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "utilities": set(),
    "storage": {"errors", "utilities"},
    "kernels": {"errors", "utilities", "storage"},
    "predictors": {"errors", "utilities", "storage"},
    "losses": {"errors"},
    "optimizers": {"errors"},
    "coding": {"errors", "utilities", "storage", "kernels", "predictors"},
    "originals": {"errors", "utilities", "storage", "coding"},
    "representation": {"errors", "utilities", "storage", "kernels", "predictors", "coding", "originals"},
    "analysis": {"errors", "utilities", "kernels", "originals", "losses", "representation"},
    "training": {
        "errors",
        "utilities",
        "storage",
        "kernels",
        "predictors",
        "losses",
        "optimizers",
        "coding",
        "originals",
        "representation",
    },
    "data": {"errors", "utilities", "originals"},
    "callbacks": {"errors", "utilities", "storage", "predictors", "originals", "representation", "analysis"},
    "cli": {
        "errors",
        "utilities",
        "storage",
        "kernels",
        "predictors",
        "optimizers",
        "losses",
        "coding",
        "originals",
        "representation",
        "analysis",
        "training",
        "data",
        "callbacks",
    },
    "__main__": {"utilities", "cli"},
    "__init__": {"kernels", "predictors", "originals", "representation", "training", "data"},
}
WITHOUT_LIGHTNING = {
    "errors",
    "utilities",
    "storage",
    "kernels",
    "predictors",
    "losses",
    "optimizers",
    "coding",
    "originals",
    "representation",
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
