"""One step at the true size of a network: `python -m tests.benchmarks.step NETWORK LAYERS HIDDEN SCHEME`.

Prints kernels, seconds and the process's peak memory as JSON. A process of its own for each: the peak is the process's.
"""

import argparse
import json
import resource
import time
from types import SimpleNamespace

import torch

from nernlit.kernels import Uniform
from nernlit.predictors import MLP
from nernlit.representation import Representation
from nernlit.training import BaselineJoint, DecoupledDistill, Progressive, ReconOnly, ReconstructionPhase, Scheme, Step
from tests.benchmarks.works import random_original

SCHEMES = ("recon", "joint", "decoupled", "progressive")
#: A step's kernels where a scheme samples, and its images where it looks at any.
KERNELS, IMAGES = 16_384, 8


def build(scheme: str, representation: Representation) -> Scheme:
    adam = torch.optim.Adam
    sampling = Uniform(KERNELS)
    if scheme == "recon":
        return ReconOnly(representation, adam, sampling=sampling, precision="bf16")
    if scheme == "joint":
        return BaselineJoint(representation, adam, sampling=sampling, precision="bf16")
    if scheme == "progressive":
        return Progressive(representation, optimizer=adam, sampling=sampling, rounds=1, precision="bf16")
    return DecoupledDistill(representation, optimizer=adam, reconstruction=ReconstructionPhase(1), precision="bf16")


def measure(network: str, layers: str, hidden: int, scheme: str) -> dict[str, float]:
    """Kernels; seconds of a second step and of predicting what an evaluation measures; GiB at the peak of it all."""
    original = random_original(network)
    predictor = MLP(hidden, activation="gelu", base=0.9, kernel_size=7 if layers == "all_convs" else 3)
    representation = Representation(original, predictor, layers=layers, order="none")  # type: ignore[arg-type]
    module = build(scheme, representation)
    module._trainer = SimpleNamespace(state=SimpleNamespace(fn="fit"))
    optimizer = torch.optim.Adam(module.trained_parameters(), lr=1e-4)
    side = 32 if network.startswith("cifar") else 224
    batch = torch.rand(IMAGES, 3, side, side), torch.zeros(IMAGES).long()

    def step() -> None:
        optimizer.zero_grad()
        seen = Step(
            representation,
            batch,
            module.target,
            module.norms_N,
            module.sizes_N,
            ensemble=module.ensemble,
            autocast=module.autocast,
        )
        torch.stack(list(module.stages[-1].objective(seen).values())).sum().backward()
        optimizer.step()

    def predict() -> None:
        with torch.inference_mode():
            module.predicted_networks()

    def seconds_of(work: object) -> float:
        began = time.perf_counter()
        work()  # type: ignore[operator]
        return time.perf_counter() - began

    step()
    return {
        "kernels": representation.layout.num_kernels,
        "step_s": seconds_of(step),
        "predict_s": seconds_of(predict),
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("network")
    parser.add_argument("layers", choices=("all_convs", "stages_3x3"))
    parser.add_argument("hidden", type=int)
    parser.add_argument("scheme", choices=SCHEMES)
    options = parser.parse_args()
    print(json.dumps(measure(options.network, options.layers, options.hidden, options.scheme)))
