"""Files, commands and names that the documentation mentions exist."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_that_a_page_links_or_names_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (page.parent / link).exists(), link
    for config in re.findall(r"(?<![\w/])configs/[\w/]+\.yaml", text):
        assert (ROOT / config).is_file(), config


def test_every_module_and_configuration_of_the_paper_map_exists() -> None:
    text = (ROOT / "docs" / "paper.md").read_text(encoding="utf-8")
    modules = re.findall(r"`([a-z]+/\w+\.py)`", text)
    assert len(modules) > 15
    for module in modules:
        assert (ROOT / "nernlit" / module).is_file(), module
    names = re.findall(r"`((?:cifar10|cifar100|stl10|imagenet|digits)_[\w{},]+)`", text)
    assert len(names) > 10
    for name in names:
        for expanded in _expanded(name):
            assert (ROOT / "configs" / f"{expanded}.yaml").is_file(), expanded


def _expanded(name: str) -> list[str]:
    """A name with braces as a shell expands them."""
    braces = re.search(r"\{([^{}]+)\}", name)
    if braces is None:
        return [name]
    choices = braces[1].split(",")
    return [each for choice in choices for each in _expanded(name[: braces.start()] + choice + name[braces.end() :])]
