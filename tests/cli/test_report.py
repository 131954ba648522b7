"""`nernlit report`: the page's numbers, that it stands alone, and that a browser sorts its tables."""

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from nernlit.cli.main import main, run
from nernlit.cli.report import page
from nernlit.cli.runs import Run
from nernlit.originals import Original
from nernlit.storage.container import read_container
from tests.fakes import CONFIGS, QUICK, write_image_folder

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
    runs[1].representation().save("net.nern")
    parts = read_container(Path("net.nern"))
    ratio = Path("net.nern").stat().st_size / parts.header["original_bytes"]
    assert float(row["CR (.nern file) %"]) == pytest.approx(100 * ratio, abs=0.006)
    assert [line[0] for line in against] == ["run", runs[1].name]
    assert len(short) == 1 + 4 + 1
    assert len(conditions) == 1 + 4 + 1 + 45
    assert "a<b" not in re.sub("<pre>.*?</pre>", "", text, flags=re.DOTALL)
    assert "a&lt;b" in text


def test_conditions_of_another_checkpoint_are_not_shown(runs: list[Run]) -> None:
    tested, text = Run.open(runs[0].folder, "last"), page([Run.open(runs[0].folder)])
    assert "Other distributions and attacks" in text
    last = page([tested])
    assert ("Other distributions and attacks" in last) == (tested.step == runs[0].step)


def test_the_command_writes_it(runs: list[Run]) -> None:
    main(["report", str(runs[0].folder), "--out", "r.html"])
    assert Path("r.html").read_text().startswith("<!doctype html>")


def _copied(run: Run, name: str) -> Path:
    """A copy of a run's folder below the working directory."""
    return Path(shutil.copytree(run.folder, name))


def test_a_run_without_readable_events_is_reported_without_curves(
    runs: list[Run], capsys: pytest.CaptureFixture[str]
) -> None:
    for name, content in {"none": None, "damaged": b"<html>not found</html>" * 50, "cut": "cut"}.items():
        folder = _copied(runs[0], name)
        (file,) = [file for file in folder.glob("events.out.tfevents.*") if b"val/acc" in file.read_bytes()]
        for other in set(folder.glob("events.out.tfevents.*")) - {file}:
            other.unlink()
        if content is None:
            file.unlink()
        else:
            file.write_bytes(file.read_bytes()[:-9] if content == "cut" else content)  # type: ignore[arg-type]
        text = page([Run.open(folder)])
        warned = capsys.readouterr().err
        assert ("holds no events of TensorBoard; its curves are left out" in warned) == (name == "damaged")
        assert ("No curves were logged by" in text) == (name != "cut")


def test_runs_that_were_tested_on_other_images_are_not_compared(
    runs: list[Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Run.batches

    def batches(run: Run, *args: Any, **options: Any) -> Any:
        found = original(run, *args, **options)
        return found if run == runs[0] else [(1 - pixels, labels) for pixels, labels in found]  # the same labels

    monkeypatch.setattr(Run, "batches", batches)
    text = page(runs)
    assert f"Tested on other images: {runs[1].name.replace('<', '&lt;')}" in text
    assert "Against" not in text


def test_a_name_is_shown_as_it_is(runs: list[Run]) -> None:
    folders = [_copied(runs[0], name) for name in (r"$\bad$ <script>", "_hidden")]
    text = page([Run.open(folder) for folder in folders])
    assert r"$\bad$ &lt;script&gt;" in text
    assert "<script>" not in text.replace("<script>\nfor(const head", "")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--out", "."], r"--out \. is a folder; expected a file, such as report\.html"),
        (["--out", "file/report.html"], "--out file: file is a file; expected a folder"),
        (["--outt", "r.html"], "unrecognized arguments: --outt r.html; `nernlit report --help` lists the options"),
        (["--data.rot=x"], r"--data\.rot: DigitsDataModule has no option 'rot'"),
        (["--data.root"], r"--data\.root needs a value"),
        (["--data.eval_sets=[Corrupted]"], r"--data\.eval_sets is for `nernlit test`; leave it out"),
        (["--sel", "last"], "unrecognized arguments: --sel last"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_mistakes_are_one_line(
    args: list[str], message: str, runs: list[Run], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("file").touch()
    before = set(Path().iterdir())
    with pytest.raises(SystemExit) as caught:
        main(["report", str(runs[0].folder), *args])
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert re.match(f"nernlit: error: .*{message}", said)
    assert said.count("\n") == 1
    assert set(Path().iterdir()) == before


def test_a_file_is_reported_beside_a_run(runs: list[Run]) -> None:
    runs[0].representation().save("net.nern")
    save_file(Original("digits_resnet8", pretrained=True).net.state_dict(), "original.safetensors")
    data = ["--data=DigitsDataModule"]
    for original in (None, Path("original.safetensors")):
        file = Run.open("net.nern", original=original)
        text = page([file, runs[0]], data)
        accuracy, against, *_ = _Tables(text).tables
        of_file, of_run = (dict(zip(accuracy[0], row, strict=True)) for row in accuracy[1:])
        assert of_file.pop("run") == "net.nern"
        assert of_run.pop("run") == runs[0].name
        if original is None:
            assert [of_file.pop(name) for name in ("original %", "difference", "from", "to", "p")] == ["-"] * 5
            of_run = {name: of_run[name] for name in of_file}
        assert of_file == of_run
        assert against[1][:2] == [runs[0].name, "0"]
        assert ("No comparison with the original: pass its weights" in text) == (original is None)
        assert "No curves were logged by net.nern." in text
        assert "<summary>specification</summary>" in text


def test_a_file_takes_nothing_from_the_folder_that_it_is_in(runs: list[Run]) -> None:
    file = _copied(runs[0], "copy") / "net.nern"
    runs[0].representation().save(file)
    main(["report", str(file), "--data", "DigitsDataModule", "--out", "r.html"])
    assert "No curves were logged by net.nern." in Path("r.html").read_text()


def test_data_that_does_not_fit_a_file_is_one_line(runs: list[Run], capsys: pytest.CaptureFixture[str]) -> None:
    runs[0].representation().save("net.nern")
    write_image_folder(Path("images"), 3, 2)
    before = set(Path().iterdir())
    for args, message in {
        (): "net.nern names no data; name it: --data=CIFAR10DataModule --data.root=DIR",
        ("--data.root", "images"): "net.nern names no data; name it",
        ("--data", "NoImages"): "--data has no images; name a dataset",
        ("--data", "FolderDataModule", "--data.root", "images"): "3 classes",
        ("--data", "DigitsDataModule", "--select", "last"): "--select last: net.nern holds one representation",
    }.items():
        with pytest.raises(SystemExit) as caught:
            main(["report", "net.nern", *args])
        assert caught.value.code == 2
        said = capsys.readouterr().err
        assert message in said
        assert "Traceback" not in said
        assert set(Path().iterdir()) == before


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
