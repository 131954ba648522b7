"""Peak memory at full size: a ResNet18 at the largest width of the paper, and all convolutions of a ResNet50."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import nernlit
from tests.benchmarks.step import SCHEMES

#: In GB; a 12 GB card must hold it.
LIMIT = 12.0


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(
    ("what", "kernels"),
    [(("resnet18", "stages_3x3", "1372"), 1_220_608), (("resnet50", "all_convs", "64"), 13_385_920)],
)
def test_a_step_of_every_scheme_fits(what: tuple[str, str, str], kernels: int, scheme: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(nernlit.__file__).parent.parent)}
    command = [sys.executable, "-m", "tests.benchmarks.step", *what, scheme]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    measured = json.loads(done.stdout)
    assert measured["kernels"] == kernels
    assert measured["peak_gib"] * 2**30 < LIMIT * 1e9
