"""What the documentation names exists."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def _functions(path: Path) -> set[str]:
    return {
        node.name for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.FunctionDef)
    }


def test_every_test_that_the_reliability_page_names_exists() -> None:
    page = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    named, file = [], ""
    for path, test in re.findall(r"`(tests/[\w/]+\.py)?(?:::(\w+))?`", page):
        file = path or file
        if path or test:
            named.append((file, test))
    assert len(named) > 150
    for file, test in named:
        assert (ROOT / file).is_file(), file
        assert not test or test in _functions(ROOT / file), f"{file}::{test}"
