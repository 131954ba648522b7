"""Disks and datasets that fail while a command runs."""

import errno
import itertools
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from nernlit.callbacks import DurableCheckpointIO
from nernlit.cli.main import main, report_failed_thread, run
from nernlit.data import FolderDataModule
from nernlit.errors import DataError
from nernlit.storage.checkpoint import read_checkpoint
from nernlit.training import DecoupledDistill
from tests.fakes import QUICK, quiet_trainer, tiny_representation, write_image_folder
from tests.faults import failing

RUN = Path("runs/digits_h96/version_0")


def _weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    state = read_checkpoint(checkpoint)["state_dict"]
    return {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("lasting", [False, True])
def test_a_fit_whose_disk_fails_at_any_call_ends_in_one_line_and_goes_on(
    lasting: bool, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threading, "excepthook", report_failed_thread)
    whole = Path("whole/digits_h96/version_0/checkpoints/last.ckpt")
    run(["fit", *QUICK, "--trainer.logger.init_args.save_dir=whole"])
    for nth in itertools.count(1):
        shutil.rmtree("runs", ignore_errors=True)
        capfd.readouterr()
        with failing(Path("runs"), nth, lasting=lasting) as faults:
            try:
                main(["fit", *QUICK])
                code = 0
            except SystemExit as ended:
                code = int(ended.code or 0)
        if not faults.happened:
            break
        said = capfd.readouterr().err
        assert "Traceback" not in said, faults.calls
        assert code == 2 or not lasting, faults.calls
        assert said.count("nernlit: error: ") == (code == 2), faults.calls
        assert ("No space left on device" in said) == (code == 2), said
        for file in Path("runs").rglob("*.ckpt"):
            read_checkpoint(file)
        main(["fit", *QUICK, "--ckpt_path=last"])
        (last,) = Path("runs").rglob("last.ckpt")
        for key, value in _weights(last).items():
            assert torch.equal(value, _weights(whole)[key]), (faults.calls, key)
        assert not list(last.parent.rglob("*.part"))
    assert nth > 40


def test_a_read_only_disk_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with failing(Path("runs"), 1, errno.EROFS, lasting=True), pytest.raises(SystemExit) as ended:
        main(["fit", *QUICK])
    assert ended.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "nernlit: error: cannot make runs/digits_h96/version_0: Read-only file system; "
        "choose another folder (--trainer.logger.save_dir)."
    )


_IN_A_SMALL_DISK = """
mount -t tmpfs -o size={size}k tmpfs disk && cd disk
{python} -m nernlit fit {quick} 2> ../first; echo $? >> ../codes
mount -o remount,size=100m tmpfs . && rm -f fill
{python} -m nernlit fit {quick} --ckpt_path=last 2> ../second; echo $? >> ../codes
cp "$(find . -name last.ckpt)" .. && find . -name '*.part' > ../unfinished
mount -o remount,ro tmpfs .
{python} -m nernlit fit {quick} 2> ../third; echo $? >> ../codes
"""


@pytest.mark.slow
@pytest.mark.parametrize("size", [20, 60, 120])
def test_a_fit_on_a_full_and_on_a_read_only_disk(size: int) -> None:
    """On a real file system: a tmpfs of the test's own, where the system allows one."""
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-Urm", "true"], check=False).returncode:
        pytest.skip("no user namespaces")
    Path("disk").mkdir()
    script = _IN_A_SMALL_DISK.format(size=size, python=sys.executable, quick=" ".join(QUICK))
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": root, "PYTHONDONTWRITEBYTECODE": "1"}
    subprocess.run(["unshare", "-Urm", "sh", "-c", script], env=environment, check=True)
    assert Path("codes").read_text().split() == ["2", "0", "2"]
    first, third = (Path(name).read_text() for name in ("first", "third"))
    assert "No space left on device" in first
    assert "Traceback" not in first + third
    assert "no permission to write into" in third
    assert Path("unfinished").read_text() == ""
    cli = run(["fit", *QUICK])
    for key, value in _weights(Path(str(cli.trainer.log_dir), "checkpoints", "last.ckpt")).items():
        assert torch.equal(value, _weights(Path("last.ckpt"))[key]), key


class Delete(L.Callback):
    """Deletes a folder when an epoch starts."""

    def __init__(self, folder: Path, epoch: int) -> None:
        self.folder, self.epoch = folder, epoch

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch == self.epoch:
            shutil.rmtree(self.folder)


@pytest.mark.parametrize(("split", "workers"), [("train", 0), ("train", 1), ("val", 0)])
def test_a_dataset_that_is_deleted_while_a_fit_reads_it_is_named(
    split: str, workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nernlit.data.base._IN_MEMORY_BYTES", 0)
    root = write_image_folder(tmp_path / "images", 10, 2, splits=("train", "val", "test"))
    module = DecoupledDistill(tiny_representation(), optimizer=torch.optim.Adam, precision="fp32")
    module.has_phase_1 = True
    trainer = quiet_trainer(
        max_epochs=3,
        num_sanity_val_steps=0,
        enable_checkpointing=True,
        callbacks=[ModelCheckpoint(tmp_path, "last", save_on_train_epoch_end=True), Delete(root / split, 1)],
        plugins=[DurableCheckpointIO()],
    )
    with pytest.raises(
        DataError, match=rf"images/{split}/class\d+/\d\.png is not a readable image \(OSError: there is no"
    ):
        trainer.fit(module, datamodule=FolderDataModule(str(root), batch_size=5, num_workers=workers))
    assert read_checkpoint(tmp_path / "last.ckpt")["global_step"] == 4
