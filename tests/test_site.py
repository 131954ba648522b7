"""The pages of the documentation site are listed, and what they show runs."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from nernlit.cli.main import main
from nernlit.representation.onnx import can_write_onnx

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
LESSONS = [DOCS / "index.md", *sorted((DOCS / "tutorials").glob("*.md"))]
#: Their commands are those of other tests too.
REPEATED = ("cluster", "progressive_chain", "stronger_teacher")
#: What makes a command of a lesson short, by its name.
SHORT = {
    "fit": [
        "--trainer.max_epochs",
        "3",
        "--trainer.limit_train_batches",
        "2",
        "--trainer.check_val_every_n_epoch",
        "1",
    ],
    "sweep": ["--trainer.max_epochs", "1", "--data.steps_per_epoch", "2", "--trainer.check_val_every_n_epoch", "1"],
    "compress": ["--epochs", "1"],
}


def _pages(entries: object) -> list[str]:
    if isinstance(entries, str):
        return [entries]
    assert isinstance(entries, list | dict)
    return [page for entry in (entries.values() if isinstance(entries, dict) else entries) for page in _pages(entry)]


def test_the_site_lists_every_page() -> None:
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert sorted(_pages(site["nav"])) == sorted(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md"))


def test_every_error_that_the_page_quotes_is_a_message_of_the_package() -> None:
    source = "".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "nernlit").rglob("*.py")))
    source = re.sub(r'"\n\s*f?"', "", source)  # messages span lines
    quoted = re.findall(r'\*\*"(.+?)"\*\*', (DOCS / "errors.md").read_text(encoding="utf-8"))
    assert len(quoted) > 8
    for quote in quoted:
        assert quote.replace("\\`", "`") in source, quote


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("lesson", LESSONS, ids=lambda page: page.stem)
def test_a_lesson_runs_as_it_is_written(lesson: Path) -> None:
    _follow(lesson, {})


@pytest.mark.parametrize(
    "lesson",
    [pytest.param(page, marks=pytest.mark.slow if page.stem in REPEATED else ()) for page in LESSONS],
    ids=lambda page: page.stem,
)
def test_a_lesson_runs_with_short_fits(lesson: Path) -> None:
    if lesson.stem == "compress_and_ship" and not can_write_onnx():
        pytest.skip("this torch cannot write the ONNX models")
    _follow(lesson, SHORT)


def _follow(lesson: Path, options: dict[str, list[str]]) -> None:
    """Run the blocks of a page in order: files of YAML, commands, and Python with common variables."""
    variables: dict[str, object] = {"__name__": "lesson"}
    for language, block in re.findall(r"```(yaml|sh|python)\n(.*?)```", lesson.read_text(encoding="utf-8"), re.DOTALL):
        if language == "python":
            block = re.sub(r"steps_per_epoch=\d+", "steps_per_epoch=5", block) if options else block
            exec(block, variables)
        elif language == "yaml":
            (name,) = re.findall(r"\A# (\w+\.yaml)$", block, re.MULTILINE)
            Path(name).write_text(block, encoding="utf-8")
        else:
            for line in block.replace("\\\n", " ").splitlines():
                program, command, *rest = shlex.split(line, comments=True)
                assert program == "nernlit"
                short = options.get(command, [])
                if short and "digits_h96_decoupled" in rest:
                    short = ["--model.reconstruction.steps=2", *short]  # the page's own value comes later and wins
                main([command, *short, *rest])
