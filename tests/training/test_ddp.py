"""Several processes against one: these tests compare what the fits of the program `tests.training.ddp` saved."""

import fcntl
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import nernlit
from tests.training.ddp.cases import CASES, SCHEMES
from tests.training.ddp.fits import IMAGES, STEPS, representation

# The first test that needs the fits waits for all of them: a minute on an idle machine, several on a busy one.
pytestmark = pytest.mark.timeout(900)

MATRIX = [f"{name}-{p}{q}" for name in SCHEMES for p in ("mlp", "table", "codebooks") for q in ("", "_quantized")]
#: Cases that are compared in the same way as those of the matrix.
OPTIONS = ["rmse", "augmented", "noise", "tuned", "warmup", "target", "ema", "clipped", "moving", "fisher"]
OPTIONS += ["calibrated", "calibrated_distill", "activation", "mixed_mse", "mixed_rmse", "progressive-seeded_apart"]
OPTIONS += ["cached_teacher"]
COMPLETE = [f"complete-{name}" for name in SCHEMES]
SAVED = [f"saved-{name}" for name in SCHEMES]
SINGLE_PRECISION = [*COMPLETE, "weighed_codes", "kronecker"]
COMPARED = [*MATRIX, *OPTIONS, *SINGLE_PRECISION, *SAVED]
REFUSED = ["poisoned", "too_few_images"]


def _resumed(before: int) -> list[str]:
    return [f"resumed-{name}-from-{before}" for name in SCHEMES]


def _fits(
    name: str, groups: list[tuple[int, list[str]]], tmp_path_factory: pytest.TempPathFactory, worker: str
) -> Path:
    """The folder with what the processes saved; the program runs once even where several test workers need it."""
    shared = tmp_path_factory.getbasetemp()
    folder = (shared if worker == "master" else shared.parent) / name
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.is_dir():
            folder.mkdir()
            environment = {
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": str(Path(nernlit.__file__).parent.parent),
            }
            arguments = [f"{processes}:{','.join(cases)}" for processes, cases in groups]
            command = [sys.executable, "-m", "tests.training.ddp", str(folder), *arguments]
            with (folder / "log").open("w") as log:
                subprocess.run(command, env=environment, cwd=folder, stdout=log, stderr=log, timeout=840, check=False)
    return folder


@pytest.fixture(scope="session")
def two(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """One process and two."""
    groups = [
        (1, [*COMPARED, "six_kernels"]),
        (2, [*COMPARED, *_resumed(1), *REFUSED]),
        (1, _resumed(2)),
        (8, ["six_kernels"]),
    ]
    return _fits("ddp_two", groups, tmp_path_factory, worker_id)


@pytest.fixture(scope="session")
def four(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """One process and four."""
    groups = [(1, COMPARED), (4, [*COMPARED, *_resumed(1), *REFUSED]), (1, _resumed(4))]
    return _fits("ddp_four", groups, tmp_path_factory, worker_id)


#: The fixture of each number of processes.
PROCESSES = pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])


@pytest.fixture
def fits(processes: int, request: pytest.FixtureRequest) -> Path:
    folder: Path = request.getfixturevalue({2: "two", 4: "four"}[processes])
    return folder


def _outcomes(fits: Path, case: str, processes: int) -> list[Any]:
    """What each process of a case has saved."""
    errors = [file.read_text() for file in sorted(fits.glob(f"{case}.{processes}.*.error"))]
    assert not errors, "\n".join(errors)
    return [torch.load(fits / f"{case}.{processes}.{rank}", weights_only=True) for rank in range(processes)]


def _relative(found: Tensor, expected: Tensor) -> float:
    """The distance of two tensors, as a share of the second's length."""
    length = float(expected.norm())
    return float((found - expected).norm()) / (length or 1.0)


def _numbers(rounds: list[dict[str, Any]]) -> list[float]:
    return [number for ended in rounds for value in ended.values() for number in torch.tensor(value).view(-1).tolist()]


@PROCESSES
@pytest.mark.parametrize("case", COMPARED)
def test_several_processes_train_like_one_with_the_joined_batch(fits: Path, case: str, processes: int) -> None:
    (alone,) = _outcomes(fits, case, 1)
    several = _outcomes(fits, case, processes)
    gradients, weights = (1e-5, 1e-5) if case in SINGLE_PRECISION else (1e-12, 1e-12)
    if case == "calibrated":
        weights = 1e-11  # a regression amplifies rounding
    for own in several:
        assert own["steps"] == alone["steps"] >= STEPS - 1
        for found, expected in zip(own["start"], alone["start"], strict=True):
            # Sums of sensitivities over processes are rounded in another order.
            assert _relative(found, expected) <= (1e-6 if case == "weighed_codes" else 0)
        for found, other in zip(own["start"], several[0]["start"], strict=True):
            assert torch.equal(found, other)
        first = 2 if case == "clipped" else 0  # gradients of a step's first batch are not reduced yet
        for step, expected_step in zip(own["gradients"][first:], alone["gradients"][first:], strict=True):
            for found, expected in zip(step, expected_step, strict=True):
                assert _relative(found, expected) < gradients
        for found, expected in zip(own["end"], alone["end"], strict=True):
            assert _relative(found, expected) < weights
        for found, other in zip(own["end"], several[0]["end"], strict=True):
            assert torch.equal(found, other)
        assert alone["codes"] is None or torch.equal(own["codes"], alone["codes"])
        assert _numbers(own["rounds"]) == pytest.approx(_numbers(alone["rounds"]), rel=1e-5)
        assert own["figures"].keys() == alone["figures"].keys()
        for name in own["figures"].keys() - {name for name in own["figures"] if name.startswith("throughput")}:
            assert own["figures"][name] == pytest.approx(alone["figures"][name], rel=1e-5, abs=1e-6), name
    assert any(float(gradient.norm()) > 0 for gradient in alone["gradients"][0])
    assert bool(alone["rounds"]) == ("progressive" in case)


@PROCESSES
@pytest.mark.parametrize("case", MATRIX)
def test_processes_share_the_kernels_of_each_step(fits: Path, case: str, processes: int) -> None:
    (alone,) = _outcomes(fits, case, 1)
    several = _outcomes(fits, case, processes)
    assert len(alone["kernels"]) == (1 if "decoupled" in case else STEPS)
    for step, expected in enumerate(alone["kernels"]):
        shares = [own["kernels"][step].tolist() for own in several]
        if case.startswith("baseline_joint"):  # all processes have gradients of all kernels, each of its own images
            assert all(sorted(share) == sorted(expected.tolist()) for share in shares)
        else:
            assert [row for share in shares for row in share] == expected.tolist()
            assert all(len(share) == len(expected) // processes for share in shares)
            assert len(set(expected.tolist())) == len(expected)


@PROCESSES
@pytest.mark.parametrize("case", ["augmented", "noise"])
def test_augmentation_and_noise_depend_on_step_and_image_only(fits: Path, case: str, processes: int) -> None:
    (alone,) = _outcomes(fits, case, 1)
    several = _outcomes(fits, case, processes)
    assert len(alone["images"]) == STEPS
    for step, expected in enumerate(alone["images"]):
        assert torch.equal(torch.cat([own["images"][step] for own in several]), expected)
        assert not torch.equal(expected, alone["images"][step - 1])


@PROCESSES
@pytest.mark.parametrize("case", COMPLETE)
def test_evaluations_count_every_image_once(fits: Path, case: str, processes: int) -> None:
    (alone,) = _outcomes(fits, case, 1)
    tested = alone["test"]
    assert {"test/acc_corrupted_contrast_3", "test/acc_fgsm_4", "test/acc_ifgsm_4_original"} <= tested.keys()
    names = [
        name
        for name in tested
        if name.startswith("test/acc") and name.removesuffix("_original") != "test/acc_corrupted"
    ]
    for own in _outcomes(fits, case, processes):
        assert own["test"].keys() == tested.keys()
        for name in names:
            count = own["test"][name] * IMAGES
            assert count == pytest.approx(round(count), abs=1e-4), name
            assert count == pytest.approx(tested[name] * IMAGES, abs=1e-4), name


@PROCESSES
@pytest.mark.parametrize("kind", ["fisher", "activation"])
def test_sensitivities_are_the_same_on_all_processes(fits: Path, kind: str, processes: int) -> None:
    (alone,) = _outcomes(fits, kind, 1)
    several = _outcomes(fits, kind, processes)
    for own in several:
        assert torch.equal(own["error_weights"], several[0]["error_weights"])
        assert _relative(own["error_weights"], alone["error_weights"]) < 1e-6
    assert float(alone["error_weights"].std()) > 0.1


@PROCESSES
def test_codes_move_in_the_same_way(fits: Path, processes: int) -> None:
    (alone,) = _outcomes(fits, "moving", 1)
    torch.manual_seed(3)
    before = representation("moving").predictor.codes
    assert not torch.equal(alone["codes"], before)
    for own in _outcomes(fits, "moving", processes):
        assert torch.equal(own["codes"], alone["codes"])


@PROCESSES
@pytest.mark.parametrize("name", SCHEMES)
def test_a_fit_goes_on_with_another_number_of_processes(fits: Path, name: str, processes: int) -> None:
    (uninterrupted,) = _outcomes(fits, f"saved-{name}", 1)
    for before, after in ((1, processes), (processes, 1)):
        for own in _outcomes(fits, f"resumed-{name}-from-{before}", after):
            assert own["first_step"] == STEPS + 1
            assert own["steps"] == uninterrupted["steps"] == 2 * STEPS
            for found, expected in zip(own["end"], uninterrupted["end"], strict=True):
                assert _relative(found, expected) < 1e-12
            assert _numbers(own["rounds"]) == pytest.approx(_numbers(uninterrupted["rounds"]))
            evaluated = {name: value for name, value in own["figures"].items() if name.startswith("val/")}
            assert {"val/acc", "val/acc_original", "val/recon_rmse"} <= evaluated.keys()
            for figure, value in evaluated.items():
                assert value == pytest.approx(uninterrupted["figures"][figure], abs=1e-6), figure


@PROCESSES
def test_one_process_writes_all_files(fits: Path, processes: int) -> None:
    for rank in range(1, processes):
        assert (fits / f"written.{processes}.{rank}").read_text() == ""
    events = [line.split(" ", 1) for line in (fits / f"written.{processes}.0").read_text().splitlines()]
    placed = Counter(re.sub(r"\.\d+\.run/", "/", path) for event, path in events if event == "os.rename")
    single = [line.split(" ", 1) for line in (fits / "written.1.0").read_text().splitlines()]
    assert placed == Counter(re.sub(r"\.\d+\.run/", "/", path) for event, path in single if event == "os.rename")
    # Each of two validations and a test writes the tables, each of two epochs a checkpoint.
    assert placed["complete-recon_only/low_frequency_energy.csv"] == 3
    assert placed["complete-recon_only/checkpoints/last.ckpt"] == 2
    assert placed["complete-progressive/rounds/rounds.json"] == 2
    for name in ("rounds/round-01.ckpt", "rounds/round-02.safetensors", "reconstructed.safetensors"):
        assert placed[f"complete-progressive/{name}"] == 1


def test_fewer_kernels_than_processes_train_like_one_process(two: Path) -> None:
    (alone,) = _outcomes(two, "six_kernels", 1)
    for own in _outcomes(two, "six_kernels", 8):
        for found, expected in zip(own["end"], alone["end"], strict=True):
            assert _relative(found, expected) < 1e-12
        for name in ("train/recon", "train/loss", "train/explained_power"):
            assert own["figures"][name] == pytest.approx(alone["figures"][name], rel=1e-5)


@PROCESSES
def test_all_processes_end_when_one_of_them_diverges(fits: Path, processes: int) -> None:
    for rank, message in enumerate(_outcomes(fits, "poisoned", processes)):
        value = "nan" if rank == 1 else "not finite on another process"
        assert message.startswith(f"the fit has diverged: at step 2 train/recon is {value} ")


@PROCESSES
def test_fewer_images_than_processes_are_refused_by_all_of_them(fits: Path, processes: int) -> None:
    for message in _outcomes(fits, "too_few_images", processes):
        assert message.startswith(
            f"{processes - 1} images cannot be shared by {processes} processes; lower --trainer.devices"
        )


def test_every_case_is_compared() -> None:
    resumed = {case for before in (1, 2, 4) for case in _resumed(before)}
    assert CASES.keys() == {*COMPARED, *REFUSED, *resumed, "six_kernels"}
