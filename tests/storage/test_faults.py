"""Every write of every kind of file fails once, as in SQLite's tests: the former file stays, and one error names it."""

import ast
import errno
import itertools
import os
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import onnx
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from onnx import helper
from safetensors.torch import load_file

import nernlit
from nernlit.callbacks import DurableCheckpointIO, RoundCheckpoint
from nernlit.callbacks.writer import write_weights
from nernlit.cli import report
from nernlit.cli.rounds import read_rounds
from nernlit.cli.run_folders import claimed_folder
from nernlit.data import DigitsDataModule
from nernlit.errors import StorageError
from nernlit.kernels import Layout, addresses
from nernlit.representation import load, write_onnx
from nernlit.storage.checkpoint import read_checkpoint
from nernlit.storage.files import write_atomically, write_figure, write_table
from nernlit.training import Progressive
from tests.fakes import digits_representation, quiet_trainer, tiny_representation
from tests.faults import failing

OUT = Path("out")
#: Writes a version of a file, and reads what was written.
Kind = tuple[Callable[[int], object], Callable[[], object]]


def _checkpoint(_: pytest.MonkeyPatch) -> Kind:
    def write(version: int) -> None:
        content = {"global_step": version, "state_dict": {"w": torch.full((20_000,), float(version))}}
        DurableCheckpointIO().save_checkpoint(content, OUT / "checkpoints" / "last.ckpt")

    return write, lambda: read_checkpoint(OUT / "checkpoints" / "last.ckpt")


def _nern(_: pytest.MonkeyPatch) -> Kind:
    versions = {version: digits_representation(7 + version) for version in (1, 2)}
    return lambda version: versions[version].save(OUT / "net.nern"), lambda: load(OUT / "net.nern")


def _rounds(_: pytest.MonkeyPatch) -> Kind:
    torch.manual_seed(0)
    module = Progressive(
        digits_representation(), optimizer=lambda params: torch.optim.Adam(params, lr=0.01), rounds=1, trials=1
    )
    trainer = quiet_trainer(max_epochs=1, num_sanity_val_steps=0, default_root_dir=OUT)
    trainer.fit(module, DigitsDataModule(train_on="none", steps_per_epoch=1))
    ended = module.ended[0]

    def write(version: int) -> None:
        module.ended = [replace(ended, recon_rmse=float(version))]
        next(module.representation.predictor.parameters()).data.fill_(0.01 * version)
        RoundCheckpoint().on_validation_end(trainer, module)

    def read() -> None:
        (record,) = read_rounds(OUT)
        load_file(record.weights)
        read_checkpoint(OUT / "rounds" / "round-01.ckpt")

    return write, read


def _table(_: pytest.MonkeyPatch) -> Kind:
    rows = [{"config": "a", "acc": 0.5}, {"config": "b", "acc": 0.25}]
    return lambda version: write_table(OUT / "sweep.csv", rows[:version]), (OUT / "sweep.csv").read_text


def _figure(_: pytest.MonkeyPatch) -> Kind:
    def write(version: int) -> None:
        figure = plt.figure(figsize=(version, 1))
        write_figure(OUT / "sweep.png", figure)
        plt.close(figure)

    return write, lambda: plt.imread(OUT / "sweep.png")


def _page(monkeypatch: pytest.MonkeyPatch) -> Kind:
    monkeypatch.setattr(report.Run, "open", lambda *_: None)

    def write(version: int) -> None:
        monkeypatch.setattr(report, "page", lambda *_: f"<html>{version}</html>" * 1000)
        report.main(["run", "--out", str(OUT / "report.html")])

    return write, (OUT / "report.html").read_text


def _onnx(monkeypatch: pytest.MonkeyPatch) -> Kind:
    def write(version: int) -> None:
        graph = helper.make_graph([helper.make_node("Relu", ["a"], ["b"])] * version, "net", [], [])
        program = SimpleNamespace(model_proto=helper.make_model(graph))
        monkeypatch.setattr("torch.onnx.export", lambda *_, **__: program)
        monkeypatch.setattr("nernlit.representation.onnx.can_write_onnx", lambda: True)  # also with an older torch
        write_onnx(representation, OUT / "net.onnx", image_size=8)

    representation = tiny_representation()
    return write, lambda: onnx.load(OUT / "net.onnx")


def _weights(_: pytest.MonkeyPatch) -> Kind:
    file = OUT / "original.safetensors"
    return lambda version: write_weights(file, "net", {"w": torch.full((9,), 1.0 * version)}), lambda: load_file(file)


KINDS: dict[str, Callable[[pytest.MonkeyPatch], Kind]] = {
    "checkpoint": _checkpoint,
    "nern": _nern,
    "rounds": _rounds,
    "table": _table,
    "figure": _figure,
    "page": _page,
    "onnx": _onnx,
    "weights": _weights,
}


def _files(folder: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


@pytest.mark.parametrize("kind", KINDS)
def test_a_write_that_fails_anywhere_leaves_whole_files_and_one_error(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, read = KINDS[kind](monkeypatch)
    write(2)
    new = _files(OUT)
    for code, lasting in itertools.product((errno.ENOSPC, errno.EIO), (False, True)):
        for nth in itertools.count(1):
            write(1)  # also removes what the failure before left
            old = _files(OUT)
            assert old.keys() == new.keys()
            with failing(OUT, nth, code, lasting) as faults:
                try:
                    write(2)
                    message = ""
                except StorageError as error:
                    message = str(error)
            if not faults.happened:
                break
            left = _files(OUT)
            # While every call fails, the unfinished file cannot be removed either; the next write removes it.
            unfinished = [file for file in left if file.suffix == ".part"]
            assert len(unfinished) <= lasting, faults.calls
            for file in new:
                assert left[file] in (old[file], new[file]), faults.calls
            read()
            if not message:  # the folder of the file is there already
                assert left == new, faults.calls
                continue
            named = re.match(rf"cannot write (\S+): {os.strerror(code)}; free space or choose another folder", message)
            assert named is not None, (faults.calls, message)
            assert Path(named[1]) in new
        assert nth > 5  # create, write, sync, rename, open and sync the folder
        assert _files(OUT) == new


def _writes(function: str, mode: str) -> bool:
    """Whether a call writes a file, by the function and its first text that may be a mode."""
    name = function.rpartition(".")[2]
    if name == "open":
        return bool(set(mode) & set("wax+"))
    return (
        name in ("write_text", "write_bytes", "save_file", "savefig", "mkdir", "makedirs") or function == "torch.save"
    )


def test_every_file_is_written_in_the_way_that_is_tested() -> None:
    package = Path(nernlit.__file__).parent
    found = set()
    for file in package.rglob("*.py"):
        for call in (node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)):
            function = ast.unparse(call.func)
            texts = [ast.literal_eval(arg) for arg in call.args if isinstance(arg, ast.Constant)]
            modes = [text for text in texts if isinstance(text, str) and re.fullmatch("[rwaxbt+]{1,3}", text)]
            if file.name != "files.py" and _writes(function, "".join(modes)):
                found.add(f"{file.relative_to(package)} {function}")
    assert found == {
        "callbacks/checkpoint_io.py torch.save",  # into memory
        "cli/claims.py folder.parent.mkdir",
        "cli/claims.py own.open",  # removed if it cannot be written
        "cli/html_page.py figure.savefig",  # into memory
        "cli/run_folders.py folder.mkdir",
        "cli/run_folders.py folder.parent.mkdir",
        "cli/search.py options.out.mkdir",
        "cli/sweep_jobs.py log.open",  # by a child process
        "cli/sweep_jobs.py log.parent.mkdir",
        "cli/sweep_fit.py Path('/proc/self/clear_refs').write_text",
    }


@pytest.mark.parametrize("nth", [1, 2, 3, 4])
def test_an_order_that_cannot_be_cached_is_used_and_computed_again(nth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["nernlit.kernels.addresses"]
    monkeypatch.setattr(module, "user_cache_path", lambda name: OUT)
    monkeypatch.setattr(module, "_CACHED_FROM", 1)
    layout, state = Layout([("w", (4, 3, 3, 3))]), {"w": torch.randn(4, 3, 3, 3)}
    with failing(OUT, nth, lasting=True) as faults:
        order = addresses(layout, state, "cross_filter")
    assert faults.happened
    assert not list(OUT.rglob("*.safetensors"))
    assert torch.equal(addresses(layout, state, "cross_filter"), order)
    assert [file.suffix for file in (OUT / "orders").iterdir()] == [".safetensors"]


def test_a_run_folder_that_cannot_be_made_is_named() -> None:
    for nth in (1, 2, 3):  # out, out/run and out/run/version_0
        with (
            failing(OUT, nth, lasting=True) as faults,
            pytest.raises(StorageError, match="cannot make out/run/version_0: No space left on device; choose another"),
            claimed_folder([TensorBoardLogger(OUT, "run")], numbered=True, fits=True),
        ):
            pass
        assert faults.happened
        assert not list(OUT.rglob("version_*"))


def test_a_file_system_that_cannot_sync_folders_is_no_failing_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def write(nth: int, code: int) -> list[str]:
        with failing(OUT, nth, code) as faults:
            write_atomically(OUT / "file", b"content")
        assert (OUT / "file").read_bytes() == b"content"
        return faults.calls

    calls = write(100, errno.EINVAL)
    assert write(len(calls), errno.EINVAL)[-1] == "fsync ."
    assert write(len(calls) - 1, errno.EACCES)[-1] == "open ."
