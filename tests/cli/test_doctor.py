import importlib.metadata
import sys
import time
from pathlib import Path

import pytest
import torch

from nernlit.cli.main import main

VERSION, REQUIRES = importlib.metadata.version, importlib.metadata.requires


def _report(capsys: pytest.CaptureFixture[str], exit_code: int = 0) -> str:
    """What the command prints on 80 columns."""
    if exit_code:
        with pytest.raises(SystemExit) as ended:
            main(["doctor"])
        assert ended.value.code == exit_code
    else:
        main(["doctor"])
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    return " ".join(shown.split())


@pytest.fixture(autouse=True)
def _terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("nernlit.cli.doctor._LEAST_FREE_GIB", 0)
    monkeypatch.setattr("shutil.which", lambda name: None)  # no nvidia-smi


def _with_versions(monkeypatch: pytest.MonkeyPatch, **versions: str | None) -> None:
    def version(package: str) -> str:
        found = versions.get(package, "missing")
        if found is None:
            raise importlib.metadata.PackageNotFoundError(package)
        return VERSION(package) if found == "missing" else found

    needs = ["torch>=2.6", "rich>=13", 'onnx>=1.19; extra == "onnx"', 'pytest>=8; extra == "dev"']
    monkeypatch.setattr("importlib.metadata.version", version)
    monkeypatch.setattr("importlib.metadata.requires", lambda package: needs)


def test_versions_devices_speed_and_caches_are_reported_in_seconds(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _with_versions(monkeypatch, torch="2.14.1")
    began = time.process_time()
    shown = _report(capsys)
    assert time.process_time() - began < 10
    assert "torch 2.14.1 >=2.6" in shown
    assert f"threads {torch.get_num_threads()} of torch" in shown
    assert "GFLOP/s (float32 products of 1024 x 1024)" in shown
    assert "orders" in shown
    assert shown.endswith("no problems found")


def test_a_version_that_is_not_supported_is_wrong(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _with_versions(monkeypatch, torch="2.5.1", rich=None)
    shown = _report(capsys, exit_code=1)
    assert "problem: torch is 2.5.1, which is not supported: pip install 'torch>=2.6'" in shown
    assert "problem: rich is missing: pip install 'rich>=13'" in shown
    assert "no problems found" not in shown


def test_a_missing_extra_is_a_note(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    _with_versions(monkeypatch, torch="2.14.1", onnx=None, pytest=None)
    shown = _report(capsys)
    assert "note: onnx>=1.19 is missing, which exports to .onnx need: pip install 'nernlit[onnx]'" in shown
    assert "pytest" not in shown
    assert shown.endswith("no problems found")


def test_a_cache_that_cannot_be_written_is_wrong(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _with_versions(monkeypatch, torch="2.14.1")
    Path("file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(Path("file").absolute()))
    shown = _report(capsys, exit_code=1)
    assert "is not writable, so each command recreates its content" in shown
    assert "set XDG_CACHE_HOME to another folder" in shown


def test_a_library_that_cannot_be_imported_is_wrong(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _with_versions(monkeypatch, torch="2.14.1")
    monkeypatch.setitem(sys.modules, "torchvision", None)
    shown = _report(capsys, exit_code=1)
    assert "problem: torchvision cannot be imported (ModuleNotFoundError: " in shown


def test_a_gpu_that_torch_does_not_see_is_wrong(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _with_versions(monkeypatch, torch="2.14.1")
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "problem: torch sees no GPU, but there is nvidia-smi: install torch for" in _report(capsys, exit_code=1)


def test_options_that_it_does_not_have_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["doctor", "--fix"])
    assert ended.value.code == 2
    assert "unrecognized arguments: --fix; `nernlit doctor --help` lists the options" in capsys.readouterr().err
