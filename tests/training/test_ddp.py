import fcntl
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import nernlit
from nernlit.predictors import Codebooks
from tests.training.ddp_fit import build

# The first test that needs the fits waits for all of them: a minute on an idle machine, several on a busy one.
pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="session")
def fits(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """The folder with the outcomes of all fits of ddp_fit.py, which runs once even where several workers need it."""
    shared = tmp_path_factory.getbasetemp()
    folder = (shared if worker_id == "master" else shared.parent) / "ddp_fits"
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.is_dir():
            folder.mkdir()
            environment = {
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": str(Path(nernlit.__file__).parent.parent),
            }
            command = [sys.executable, str(Path(__file__).with_name("ddp_fit.py")), str(folder)]
            with (folder / "log").open("w") as log:
                subprocess.run(command, env=environment, cwd=folder, stdout=log, stderr=log, timeout=840, check=False)
    return folder


def _outcomes(fits: Path, scheme: str, processes: int, suffix: str = "") -> list[dict[str, Any]]:
    """What each process of a fit has saved."""
    errors = [file.read_text() for file in sorted(fits.glob(f"{scheme}.{processes}.*.error"))]
    assert not errors, "\n".join(errors)
    return [torch.load(fits / f"{scheme}.{processes}.{rank}{suffix}", weights_only=True) for rank in range(processes)]


@pytest.mark.parametrize("scheme", ["mse", "rmse", "decoupled", "moving", "joint", "progressive", "fisher"])
def test_two_processes_train_like_one_with_the_joined_batch(fits: Path, scheme: str) -> None:
    (alone,) = _outcomes(fits, scheme, 1)
    both = _outcomes(fits, scheme, 2)
    for one, two, single in zip(both[0]["start"], both[1]["start"], alone["start"], strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, single)
    sampled = [set(outcome["sampled"].tolist()) for outcome in both]
    assert not sampled[0] & sampled[1]
    assert sampled[0] | sampled[1] == set(alone["sampled"].tolist())
    for one, two, single in zip(both[0]["end"], both[1]["end"], alone["end"], strict=True):
        assert torch.equal(one, two)
        assert torch.allclose(one, single, rtol=1e-4, atol=1e-6)
    assert (alone["error_weights"] is not None) == (scheme == "fisher")
    if scheme == "fisher":
        assert all(torch.equal(outcome["error_weights"], alone["error_weights"]) for outcome in both)
    assert (alone["codes"] is not None) == (scheme == "moving")
    if scheme == "moving":
        fitted = build(scheme, 64).representation.predictor
        assert isinstance(fitted, Codebooks)
        assert not torch.equal(alone["codes"], fitted.codes)
        assert torch.equal(both[0]["codes"], both[1]["codes"])
        assert torch.equal(both[0]["codes"], alone["codes"])
    # 31 images on two processes: the shares of 31 must come out exactly, on every process.
    for outcome in both:
        for name in ("val/acc", "val/acc_original", "val/acc_top5"):
            assert outcome["val"][name] == pytest.approx(alone["val"][name], abs=1e-6)
    # So must those of corrupted and attacked images; the weights differ by rounding, which may turn an answer or two.
    (single,) = _outcomes(fits, scheme, 1, ".test")
    assert {"test/acc_corrupted_contrast_3", "test/acc_fgsm_4", "test/acc_ifgsm_4_original"} <= single.keys()
    for outcome in _outcomes(fits, scheme, 2, ".test"):
        assert outcome.keys() == single.keys()
        for name, value in single.items():
            assert outcome[name] == pytest.approx(value, abs=1e-6 if name.endswith("_original") else 2.1 / 360), name


@pytest.mark.parametrize(("scheme", "processes"), [("mixed_mse", 2), ("mixed_rmse", 2), ("six_kernels", 8)])
def test_uneven_shares_train_like_one_process_with_all_of_them(fits: Path, scheme: str, processes: int) -> None:
    (alone,) = _outcomes(fits, scheme, 1)
    for outcome in _outcomes(fits, scheme, processes):
        for one, single in zip(outcome["end"], alone["end"], strict=True):
            assert torch.allclose(one, single, rtol=0, atol=1e-6)
        assert outcome["train"] == pytest.approx(alone["train"], rel=1e-5, abs=1e-6)
    assert len(alone["train"]) == 3


def test_all_processes_end_when_one_of_them_diverges(fits: Path) -> None:
    for rank, value in enumerate(["not finite on another process", "nan"]):
        error = (fits / f"poisoned.2.{rank}.error").read_text()
        assert f"the fit has diverged: at step 2 train/recon is {value} " in error
