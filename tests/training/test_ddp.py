import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import nernlit

SCRIPT = Path(__file__).with_name("ddp_fit.py")


def _fit(processes: int, batch_size: int, scheme: str, out: Path) -> list[dict[str, Any]]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(nernlit.__file__).parent.parent)}
    command = [sys.executable, str(SCRIPT), str(processes), str(batch_size), scheme, str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=840, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(f"{out}.{rank}", weights_only=True) for rank in range(processes)]


@pytest.mark.timeout(900)  # seconds on an idle machine, minutes on a busy one
@pytest.mark.parametrize("scheme", ["mse", "rmse", "decoupled", "joint", "progressive"])
def test_two_processes_train_like_one_with_the_joined_batch(tmp_path: Path, scheme: str) -> None:
    (alone,) = _fit(1, 64, scheme, tmp_path / "alone")
    both = _fit(2, 32, scheme, tmp_path / "both")
    for one, two, single in zip(both[0]["start"], both[1]["start"], alone["start"], strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, single)
    sampled = [set(outcome["sampled"].tolist()) for outcome in both]
    assert not sampled[0] & sampled[1]
    assert sampled[0] | sampled[1] == set(alone["sampled"].tolist())
    for one, two, single in zip(both[0]["end"], both[1]["end"], alone["end"], strict=True):
        assert torch.equal(one, two)
        assert torch.allclose(one, single, rtol=1e-4, atol=1e-6)
    # 31 images on two processes: the shares of 31 must come out exactly, on every process.
    for outcome in both:
        for name in ("val/acc", "val/acc_original", "val/acc_top5"):
            assert outcome["val"][name] == pytest.approx(alone["val"][name], abs=1e-6)
    # So must those of corrupted and attacked images; the weights differ by rounding, which may turn an answer or two.
    single, *shared = (torch.load(file, weights_only=True) for file in _tested(tmp_path))
    assert {"test/acc_corrupted_contrast_3", "test/acc_fgsm_4", "test/acc_ifgsm_4_original"} <= single.keys()
    for outcome in shared:
        assert outcome.keys() == single.keys()
        for name, value in single.items():
            assert outcome[name] == pytest.approx(value, abs=1e-6 if name.endswith("_original") else 2.1 / 360), name


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("scheme", "processes"), [("mixed_mse", 2), ("mixed_rmse", 2), ("six_kernels", 8)])
def test_uneven_shares_train_like_one_process_with_all_of_them(tmp_path: Path, scheme: str, processes: int) -> None:
    (alone,) = _fit(1, 16, scheme, tmp_path / "alone")
    shared = _fit(processes, 16 // processes, scheme, tmp_path / "shared")
    for outcome in shared:
        for one, single in zip(outcome["end"], alone["end"], strict=True):
            assert torch.allclose(one, single, rtol=0, atol=1e-6)
        assert outcome["train"] == pytest.approx(alone["train"], rel=1e-5, abs=1e-6)
    assert len(alone["train"]) == 3


def _tested(folder: Path) -> list[Path]:
    return [folder / "alone.test.0", folder / "both.test.0", folder / "both.test.1"]
