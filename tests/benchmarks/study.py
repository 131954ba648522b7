"""The study of Recon-only's optimizer: `python -m tests.benchmarks.study --original cifar_resnet20=FILE`.

Every setting is the default with a few changes, fitted for the same number of steps with each seed. A line of
`study.jsonl` is one fit: explained power, and the curve of it against the seconds spent in steps. Fits that the file
has already are not run again; `curves_*.png` is drawn from those of the given settings. Run it on an otherwise idle
machine.
"""

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from nernlit.kernels import AllKernels, Layout, MagnitudeMix, Sampling, Uniform
from nernlit.losses import explained_power
from nernlit.optimizers import WarmupCosine
from nernlit.originals import Original
from nernlit.predictors import MLP
from nernlit.representation import Representation, calibrate
from tests.benchmarks.study_errors import Errors
from tests.benchmarks.study_images import Measured
from tests.benchmarks.study_settings import OPTIMIZERS, SETTINGS, Setting, build_mlp, build_optimizer, width
from tests.benchmarks.study_tables import study_figure, study_tables

_POINTS = 20  # of a curve
_CALIBRATION_IMAGES = 1024


@cache
def _layers(original: Original) -> list[tuple[int, int]]:
    grids = Layout.from_module(original.net).layers
    return [(layer.grid[0], layer.grid[1]) for layer in grids]


def fit(
    original: Original, hidden: int, steps: int, seed: int, setting: Setting, images: Path | None = None
) -> dict[str, Any]:
    """One fit: explained power in the end, seconds in steps, and the curve of (seconds, explained power).

    With images it also has the accuracy, see `study_images`, and that with calibrated kept tensors (`calibrated_...`).
    """
    torch.manual_seed(seed)
    device = original.mean.device
    mlp = build_mlp(setting, width(setting, hidden, _layers(original)))
    whole = Representation(original, mlp, order=setting.order, standardize=setting.standardize, tune_kept="affine")
    whole = whole.to(device)
    average = AveragedModel(mlp, multi_avg_fn=get_ema_multi_avg_fn(setting.ema)) if setting.ema else None
    optimizer = build_optimizer(setting, mlp.parameters())
    schedule = WarmupCosine(optimizer, setting.warmup_steps, total_steps=steps)
    smallest = 2 / (1 + setting.batch_growth)
    largest = round(setting.batch_size * smallest * setting.batch_growth)
    sampling = _sampling(setting, largest)
    norms, mask = whole.target.flatten(1).norm(dim=1).cpu(), whole.learned.mask()
    errors = Errors(whole, setting, images)
    seconds, curve = 0.0, []
    for step in range(steps):
        began = time.perf_counter()
        rows = sampling.indices(norms, seed, step)
        rows = rows[: round(len(rows) * (1 / setting.batch_growth + (1 - 1 / setting.batch_growth) * step / steps))]
        rows = errors.drawn(rows, seed, step).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=setting.precision == "bf16"):
            predicted = whole.kernels(rows)
        error = errors(predicted / whole.scale, rows, step / steps)
        optimizer.zero_grad()
        (error.sqrt() if setting.loss == "rmse" else error).backward()
        optimizer.step()
        schedule.step()
        if average is not None:
            average.update_parameters(mlp)
        seconds += time.perf_counter() - began
        if (step + 1) % max(1, steps // _POINTS) == 0 or step == steps - 1:
            with torch.no_grad():
                table = whole.kernels(predictor=mlp if average is None else average.module)
                curve.append((seconds, float(explained_power(table, whole.target, mask))))
    found = {"width": mlp.hidden, "params": mlp.num_params, "explained_power": curve[-1][1], "seconds": seconds}
    measured: dict[str, Any] = {}
    if images is not None:
        reference = _measured(original, images)
        measured = reference.results(whole)
        calibrate(whole, reference.training_images(_CALIBRATION_IMAGES))
        measured |= {f"calibrated_{name}": value for name, value in reference.results(whole).items()}
    return {**found, **measured, "curve": curve}


@cache
def _measured(original: Original, images: Path) -> Measured:
    return Measured(images, Representation(original, MLP(8), order="none"))


def _sampling(setting: Setting, batch_size: int) -> Sampling:
    if setting.sampling == "all":
        return AllKernels()
    return Uniform(batch_size) if setting.sampling == "uniform" else MagnitudeMix(batch_size)


def runs(names: list[str], hidden: list[int], seeds: list[int]) -> Iterator[tuple[int, str, int]]:
    """Seed by seed, so that an interrupted study has every setting once before it has one three times."""
    yield from ((width, name, seed) for seed in seeds for width in hidden for name in names)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--original", required=True, help="NAME=FILE of a trained network")
    parser.add_argument("--hidden", type=int, nargs="+", default=[180])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    installed = [name for name in OPTIMIZERS if name != "SOAP" or find_spec("pytorch_optimizer")]
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=installed, metavar="NAME")
    parser.add_argument("--images", type=Path, help="folder of CIFAR-10, to measure accuracy as well")
    parser.add_argument("--device", default="cpu", help="of fits and images, for example cuda")
    parser.add_argument("--out", type=Path, default=Path("runs/study"))
    options = parser.parse_args()
    network, _, file = options.original.partition("=")
    original = Original(network, checkpoint=file).to(options.device)
    options.out.mkdir(parents=True, exist_ok=True)
    record = options.out / "study.jsonl"
    lines = [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []
    for hidden, name, seed in runs(options.settings, options.hidden, options.seeds):
        what = {"network": network, "hidden": hidden, "steps": options.steps, "name": name, "seed": seed}
        if not any(what.items() <= line.items() for line in lines):
            lines.append(
                what
                | fit(original, hidden, options.steps, seed, SETTINGS[name], options.images)
                | asdict(SETTINGS[name])
            )
            with record.open("a") as stream:
                stream.write(json.dumps(lines[-1]) + "\n")
    for hidden in options.hidden:
        same = {"network": network, "hidden": hidden, "steps": options.steps}
        mine = [line for line in lines if same.items() <= line.items() and line["name"] in options.settings]
        for table in study_tables(mine, f"{network}, H={hidden}, {options.steps} steps"):
            Console().print(table)
        study_figure(mine).savefig(options.out / f"curves_{network}_h{hidden}_{options.steps}.png", dpi=120)


if __name__ == "__main__":
    main()
