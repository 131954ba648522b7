"""Time and memory of predictors of large networks: `python -m tests.benchmarks.large`, on Linux.

Each row is a network with random weights and a predictor. It is fitted and saved in a process of its own, and loaded
in another, which predicts all weights; both use one thread. Rows are printed as a table in Markdown: CPU seconds, wall
seconds in parentheses, and the most GiB of the process in memory.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from nernlit.coding import NernFile
from nernlit.predictors import Codebooks, Predictor, Quantize, Table
from nernlit.representation import Representation
from tests.benchmarks.works import random_original

#: Name -> network, layers, how 1x1 convolutions are divided, and the size of kernels.
NETWORKS: dict[str, tuple[str, Any, Any, int]] = {
    "resnet18, all, 7x7": ("resnet18", "all", "tile", 7),
    "resnet50, all, 7x7": ("resnet50", "all", "tile", 7),
    "mobilenetv2_100, all, 3x3": ("mobilenetv2_100", "all", "tile", 3),
    "mobilenetv2_100, all_convs, crop, 3x3": ("mobilenetv2_100", "all_convs", "crop", 3),
    "vit_tiny_patch16_224, all_linear, 3x3": ("vit_tiny_patch16_224", "all_linear", "tile", 3),
    "vgg11, all, 7x7": ("vgg11", "all", "tile", 7),  # its first linear layer is a convolution of 7x7
}
PREDICTORS: dict[str, Callable[[int], Predictor]] = {
    "codebooks": lambda size: Codebooks(codebooks=2, bits=8, kernel_size=size),
    "table": lambda size: Table(kernel_size=size),
    "quantized table": lambda size: Table(kernel_size=size),
}
PARTS = ("fit", "sizes", "save", "load")
T = TypeVar("T")


def costs(name: str, work: Callable[[], T]) -> tuple[dict[str, float], T]:
    """CPU seconds, wall seconds and the process's peak GiB of a piece of work, and what it returns. Linux only."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again
    began, cpu = time.perf_counter(), time.process_time()
    result = work()
    cpu, wall = time.process_time() - cpu, time.perf_counter() - began
    return {f"{name}_cpu_s": cpu, f"{name}_wall_s": wall, f"{name}_peak_gib": resident("VmHWM")}, result


def resident(entry: str) -> float:
    """GiB of this process that are in memory now (`VmRSS`), or were at most (`VmHWM`)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{entry}:")).split()[1]) / 2**20


def fitted(network: str, predictor: str, path: Path) -> dict[str, float]:
    """What fitting and saving cost, and the size of the file."""
    name, layers, pointwise, size = NETWORKS[network]
    original = random_original(name)
    before = resident("VmRSS")
    quantize = Quantize(2.0) if predictor == "quantized table" else None
    options: dict[str, Any] = {"layers": layers, "pointwise": pointwise, "order": "none", "quantize": quantize}
    fit, representation = costs("fit", lambda: Representation(original, PREDICTORS[predictor](size), **options))
    sizes, found = costs("sizes", representation.sizes)
    save, _ = costs("save", lambda: representation.save(path))
    weights = representation.layout.num_weights
    figures = {"weights": weights, "mb": found.file_bytes / 1e6, "bits": 8 * found.file_bytes / weights}
    return {**figures, "fit_before_gib": before, **fit, **sizes, **save}


def loaded(path: Path) -> dict[str, float]:
    """What it costs to load a file and to predict all weights."""
    before = resident("VmRSS")
    load, _ = costs("load", lambda: NernFile.read(path, max_gib=24).state_dict())
    return {"load_before_gib": before, **load}


def line(network: str, predictor: str) -> str:
    """The figures as a row of a table in Markdown."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "tests.benchmarks.large", network, predictor, f"{folder}/net.nern"]
        figures: dict[str, float] = {}
        for _ in range(2):
            printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            figures |= json.loads(printed)
    parts = [
        f"{figures[f'{part}_cpu_s']:.1f} ({figures[f'{part}_wall_s']:.1f}), {figures[f'{part}_peak_gib']:.1f}"
        for part in PARTS
    ]
    size = f"{figures['mb']:.2f}, {figures['bits']:.2f}"
    before = f"{figures['fit_before_gib']:.1f}, {figures['load_before_gib']:.1f}"
    return f"| {network} | {predictor} | {figures['weights'] / 1e6:.1f} | {size} | {before} | {' | '.join(parts)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", nargs="*", help="network, predictor and file; the file is loaded if it exists")
    parser.add_argument("--only", default="", help="rows whose network and predictor have this in them")
    options = parser.parse_args()
    if options.part:
        torch.set_num_threads(1)
        network, predictor, path = options.part[0], options.part[1], Path(options.part[2])
        print(json.dumps(loaded(path) if path.exists() else fitted(network, predictor, path)))
        return
    columns = "network", "predictor", "million weights", "MB, bits per weight", "GiB before fit and load", *PARTS
    print(f"| {' | '.join(columns)} |")
    print("|---" * len(columns) + "|")
    for network in NETWORKS:
        for predictor in PREDICTORS:
            if options.only in f"{network}, {predictor}":
                print(line(network, predictor), flush=True)


if __name__ == "__main__":
    main()
