"""`nernlit report`: the page's numbers, that it stands alone, and that a browser sorts its tables."""

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from nernlit.cli import main, run
from nernlit.report import page
from nernlit.runs import Run
from tests.fakes import CONFIGS, QUICK

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


class _Tables(HTMLParser):
    """Every table's rows of cell texts, and what the page would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.loaded: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loaded += [str(value) for name, value in attrs if name in ("src", "href")]
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        self._in_cell = tag in ("td", "th")

    def handle_endtag(self, tag: str) -> None:
        self._in_cell = False

    def handle_data(self, data: str) -> None:
        if getattr(self, "_in_cell", False) and self.tables:
            self.tables[-1][-1].append(data)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    root = tmp_path_factory.mktemp("fits")
    logger = "--trainer.logger.init_args"
    named = [[f"{logger}.save_dir={root}", f"{logger}.name={name}"] for name in ("one", "a<b")]
    fitted = [
        run(["fit", *QUICK, *named[0]]),
        run(["fit", *QUICK, *named[1], "--model.representation.predictor.hidden=32"]),
    ]
    run(["test", *QUICK, *named[0], "-c", str(CONFIGS / "base" / "robustness.yaml"), "--ckpt_path", "best"])
    return [Run.open(cli.trainer.log_dir) for cli in fitted]


def test_the_page_stands_alone_and_says_what_the_networks_do(runs: list[Run]) -> None:
    text = page(runs)
    read = _Tables(text)
    assert all(source.startswith("data:image/png;base64,") for source in read.loaded)
    assert len(read.loaded) == 5  # three curves, and the spectrum of each run
    accuracy, against, short, conditions = read.tables
    (pixels, labels), *_ = runs[1].batches("test")
    representation = runs[1].representation()
    with torch.no_grad():
        answers = [net(pixels).argmax(1) for net in (representation.original, representation)]
    right = [100 * float((answer == labels).float().mean()) for answer in answers]
    row = dict(zip(accuracy[0], accuracy[2], strict=True))
    assert [float(row["original %"]), float(row["reconstructed %"])] == pytest.approx(right, abs=0.006)
    assert row["run"] == runs[1].name
    assert float(row["CR (paper) %"]) == pytest.approx(100 * representation.sizes().cr_paper, abs=0.006)
    assert [line[0] for line in against] == ["run", runs[1].name]
    assert len(short) == 1 + 4 + 1
    assert len(conditions) == 1 + 4 + 1 + 45
    assert "a<b" not in re.sub("<pre>.*?</pre>", "", text, flags=re.DOTALL)
    assert "a&lt;b" in text


def test_the_command_writes_it(runs: list[Run]) -> None:
    main(["report", str(runs[0].folder), "--out", "r.html"])
    assert Path("r.html").read_text().startswith("<!doctype html>")


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_a_browser_sorts_a_table_by_a_click(runs: list[Run]) -> None:
    column = 2
    click = f"document.querySelectorAll('th')[{column}].click();"

    def shown(clicks: int) -> list[float]:
        Path("page.html").write_text(page(runs).replace("</body>", f"<script>{click * clicks}</script></body>"))
        command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        command += ["--disable-sync", "--no-first-run", "--user-data-dir=browser", "--dump-dom", "page.html"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        return [float(row[column]) for row in _Tables(done.stdout).tables[0][1:]]

    assert shown(1) == sorted(shown(0))
    assert shown(2) == sorted(shown(0), reverse=True)
