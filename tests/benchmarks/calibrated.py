"""Predictors that are fitted but not trained, before and after calibration.

`python -m tests.benchmarks.calibrated --original cifar_resnet20=FILE --images DIR` prints a row per predictor: the size
of its .nern file, the divergence from the original on the validation images, and the test accuracy.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from nernlit.originals import Original
from nernlit.predictors import Codebooks
from nernlit.representation import Representation, calibrate
from nernlit.training.compression import KEPT, quantized_table
from tests.benchmarks.study_images import Measured


def _codebooks(original: Original, codebooks: int, bits: int, scale: str) -> Representation:
    predictor = Codebooks(codebooks, bits, scale=scale)  # type: ignore[arg-type]
    return Representation(original, predictor, order="none", tune_kept="affine")


PREDICTORS: dict[str, Callable[[Original], Representation]] = {
    "Codebooks, 3 of 128 codewords, a scale per filter": partial(_codebooks, codebooks=3, bits=7, scale="filter"),
    "Codebooks, 4 of 16, a scale per filter": partial(_codebooks, codebooks=4, bits=4, scale="filter"),
    "Codebooks, 2 of 64": partial(_codebooks, codebooks=2, bits=6, scale="none"),
    **{f"Table, {bits} bits": partial(quantized_table, bits=bits) for bits in (4.0, 3.0, 2.0)},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--original", required=True, help="NAME=FILE of a trained network")
    parser.add_argument("--images", type=Path, required=True, help="folder of CIFAR-10")
    parser.add_argument("--calibration_images", type=int, default=1024)
    options = parser.parse_args()
    network, _, file = options.original.partition("=")
    original, measured = Original(network, checkpoint=file), None
    for name, make in PREDICTORS.items():
        torch.manual_seed(0)
        representation = make(original)
        measured = measured or Measured(options.images, representation)
        before = measured.results(representation)
        began = time.perf_counter()
        calibrate(representation, measured.training_images(options.calibration_images))
        seconds, after = time.perf_counter() - began, measured.results(representation)
        sizes = representation.sizes(KEPT, fold_batch_norm=True)
        figures = [f"{100 * sizes.file_bytes / sizes.original_bytes:.1f}%"]
        for results in (before, after):
            figures.append(f"{results['val_kl']:.3f} {100 * results['test_acc']:.2f}%")
        print(f"| {name} | {' | '.join(figures)} | {seconds:.0f} s |", flush=True)


if __name__ == "__main__":
    main()
