"""Peak memory of the largest shipped configuration: the 3x3 convolutions of a ResNet18 at hidden width 1372."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

import nernlit

#: In bytes; the largest of the paper's tables must fit a 12 GB card with room for the images' activations.
LIMIT = 12e9


def _step() -> None:
    import torch

    from nernlit.modules import DecoupledDistill
    from nernlit.originals import Original
    from nernlit.predictors import MLP
    from nernlit.representation import Representation

    original = Original("resnet18")
    original.weights_from = "random numbers, for measuring memory"
    representation = Representation(original, MLP(1372, activation="gelu"), layers="stages_3x3", order="none")
    assert representation.layout.num_kernels == 1_220_608
    module = DecoupledDistill(representation, optimizer=torch.optim.Adam, recon_steps=1)
    module.stage = 1
    optimizer = torch.optim.Adam(module.trained_parameters(), lr=1e-4)
    loss = torch.stack(list(module.loss_terms((torch.rand(32, 3, 224, 224), torch.zeros(32).long())).values())).sum()
    loss.backward()
    optimizer.step()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_distillation_step_of_resnet18_at_the_papers_largest_width_fits() -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(nernlit.__file__).parent.parent)}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.split()[-1]) < LIMIT


if __name__ == "__main__":
    _step()
