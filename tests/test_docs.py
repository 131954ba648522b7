"""Files, commands and names that the documentation mentions exist."""

import ast
import re
import shlex
from pathlib import Path

import pytest

from nernlit.cli.main import main

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def _anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and mkdocs make them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


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


def _fits(page: Path) -> list[str]:
    """The `fit` commands of a page that are written in full."""
    blocks = re.findall(r"^```sh\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    commands = [line.split(" #")[0].strip() for line in lines if re.match(r"(nernlit|lightning) fit ", line)]
    return [
        command
        for command in commands
        if not re.search(r"\.\.\.|\$|\bRUN|mine|\bmy(_\w+)?\.yaml|_original\.yaml", command)
    ]


def test_every_fit_of_a_page_has_options_that_exist(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)  # some name files of the clone
    pages = [page for page in PAGES if page.parent.name != "tutorials"]  # test_site.py runs the tutorials
    commands = {command for page in pages for command in _fits(page)}
    assert len(commands) > 20
    for command in sorted(commands):
        with pytest.raises(SystemExit) as ended:
            main([*shlex.split(command)[1:], "--print_config"])
        assert ended.value.code in (0, None), f"{command}\n{capsys.readouterr().err}"


def test_every_configuration_that_a_page_names_is_shipped() -> None:
    shipped = {path.stem for path in (ROOT / "configs").rglob("*.yaml")}
    names = {
        name
        for page in PAGES
        for name in re.findall(r"(?:-c|--configs) ([a-z]+\d*_h\d+\w*)", page.read_text(encoding="utf-8"))
    }
    assert len(names) > 10
    assert names - {"my_h140"} <= shipped


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_file_that_a_page_links_or_names_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for link, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", text):
        file = page.parent / link if link else page
        assert file.exists(), link
        assert not anchor or anchor in _anchors(file), f"{link}#{anchor}"
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
