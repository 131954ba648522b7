"""The study of Recon-only's optimizer: `python -m tests.benchmarks.study --original cifar_resnet20=FILE`.

Every setting is the default with a few changes, fitted for the same number of steps with each seed. A line of
`study.jsonl` is one fit: explained power, and the curve of it against the seconds spent in steps. Fits that the file
has already are not run again; `curves_*.png` is drawn from those of the given settings. Run it on an otherwise idle
machine.
"""

import argparse
import json
import time
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import timm.optim
import torch
from rich.console import Console
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from nernlit.data import CIFAR10DataModule
from nernlit.kernels import Layout, MagnitudeMix, OrderName, Sampling, Uniform
from nernlit.losses import explained_power, reconstruction_mse
from nernlit.optimizers import Ranger, WarmupCosine
from nernlit.originals import Original
from nernlit.predictors import MLP
from nernlit.representation import Representation, calibrate
from nernlit.training.sensitivity import NO_SENSITIVITY, Sensitivity, error_weights
from tests.benchmarks.study_images import Measured
from tests.benchmarks.study_tables import study_figure, study_tables

_POINTS = 20  # of a curve
_CALIBRATION_IMAGES = 1024


@dataclass(frozen=True)
class Setting:
    """The default of the shipped configurations; a study changes a field or two."""

    optimizer: str = "muon"
    lr: float = 0.02
    momentum: float = 0.9
    nesterov: bool = True
    ns_steps: int = 5
    warmup_steps: int = 50
    batch_size: int = 4096
    sampling: Literal["uniform", "magnitude"] = "uniform"
    precision: Literal["fp32", "bf16"] = "bf16"
    loss: Literal["mse", "rmse"] = "mse"
    standardize: bool = True
    order: OrderName = "in_filter"
    activation: str = "gelu"
    base: float = 0.9
    num_frequencies: int = 40
    lookahead: bool = False
    ema: float = 0.0  # decay of an average of the predictor's parameters, which is then what is measured
    batch_growth: float = 1.0  # the last batch over the first; the mean stays
    scale_layers: bool = False  # outputs in units of their layer's root mean square; the loss in the network's
    mlp: dict[str, Any] = field(default_factory=dict)  # further options of the MLP
    sensitivity: Sensitivity = NO_SENSITIVITY
    anneal: bool = False  # the exponent of the sensitivity decreases to 0 over the fit
    level: Literal["entry", "kernel", "layer"] = "entry"  # what has one error weight, their mean
    sampled: bool = False  # kernels are drawn in proportion to their error weights, and errors count alike


NERN = Setting("ranger", 5e-3, warmup_steps=0, sampling="magnitude", precision="fp32", loss="rmse", standardize=False)

#: Learning rates of other optimizers: the best of three or more at H=180, 600 steps, seed 0; NeRN's is its own.
OPTIMIZERS: dict[str, Setting] = {
    "default": Setting(),
    "fp32": Setting(precision="fp32"),
    "NeRN": replace(NERN, activation="relu", base=0.76),
    "Ranger on standardized weights, MSE": replace(NERN, lr=0.02, precision="bf16", loss="mse", standardize=True),
    "Adam": Setting("adam", 0.02),
    "SOAP": Setting("soap", 0.03),  # pip install pytorch_optimizer
    "AdaMuon": Setting("adamuon", 0.03),
    "momentum 0.95": Setting(momentum=0.95),
    "no Nesterov": Setting(nesterov=False),
    "lr 0.01": Setting(lr=0.01),
    "lr 0.03": Setting(lr=0.03),
    "3 Newton-Schulz steps": Setting(ns_steps=3),
    "magnitude mix": Setting(sampling="magnitude"),
    "batch 2048": Setting(batch_size=2048),
    "batch 8192": Setting(batch_size=8192),
    "RMSE loss": Setting(loss="rmse"),
    "ReLU": Setting(activation="relu"),
    "SiLU": Setting(activation="silu"),
    "base 0.76": Setting(base=0.76),
    "base 0.85": Setting(base=0.85),
    "base 0.93": Setting(base=0.93),
    "cross-filter order": Setting(order="cross_filter"),
    "no order": Setting(order="none"),
    "Lookahead": Setting(lookahead=True),
    "averaged parameters (EMA 0.98)": Setting(ema=0.98),
    "batch grown from 2048 to 6144": Setting(batch_growth=3.0),
    "scale by layer": Setting(scale_layers=True),
}

#: Other predictors, with the hidden width that needs as many parameters as the default's, or a few less.
PREDICTORS: dict[str, Setting] = {
    "rank 24": Setting(mlp={"rank": 24}),
    "20 frequencies, base 0.81": Setting(num_frequencies=20, base=0.81),
    "12 frequencies, base 0.7": Setting(num_frequencies=12, base=0.7),
    "embedding of 16 by layer, 12 frequencies": Setting(
        num_frequencies=12, base=0.7, mlp={"embedding": 16, "embedding_share": "layer"}
    ),
    "sine": Setting(activation="sine"),
    "residual": Setting(mlp={"residual": True}),
    "heads by stage": Setting(mlp={"heads": "stage"}),
}

#: How much the error of each weight counts.
SENSITIVITIES: dict[str, Setting] = {
    "fisher 0.25": Setting(sensitivity=Sensitivity("fisher", 0.25)),
    "fisher 0.35": Setting(sensitivity=Sensitivity("fisher", 0.35)),
    "fisher 0.35, annealed": Setting(sensitivity=Sensitivity("fisher", 0.35), anneal=True),
    "batchnorm 0.35": Setting(sensitivity=Sensitivity("batchnorm", 0.35)),
    "fisher 0.35 per kernel": Setting(sensitivity=Sensitivity("fisher", 0.35), level="kernel"),
    "fisher 0.35 per layer": Setting(sensitivity=Sensitivity("fisher", 0.35), level="layer"),
    "fisher 0.35, sampled": Setting(sensitivity=Sensitivity("fisher", 0.35), sampled=True),
    "fisher 0.35, 64 images": Setting(sensitivity=Sensitivity("fisher", 0.35, num_images=64)),
    "fisher 0.35, 8192 images": Setting(sensitivity=Sensitivity("fisher", 0.35, num_images=8192)),
}
SETTINGS = OPTIMIZERS | PREDICTORS | SENSITIVITIES


def build_optimizer(setting: Setting, parameters: Iterable[Parameter]) -> Optimizer:
    options: dict[str, dict[str, Any]] = {
        "muon": {"momentum": setting.momentum, "nesterov": setting.nesterov, "ns_steps": setting.ns_steps}
    }
    if setting.optimizer == "ranger":
        return Ranger(list(parameters), lr=setting.lr, betas=(0.5, 0.999), weight_decay=1e-3)
    if setting.optimizer == "soap":
        from pytorch_optimizer import SOAP

        return SOAP(list(parameters), lr=setting.lr, weight_decay=0.0)
    named = options.get(setting.optimizer, {})
    name = f"lookahead_{setting.optimizer}" if setting.lookahead else setting.optimizer
    return timm.optim.create_optimizer_v2(list(parameters), name, lr=setting.lr, **named)


def _mlp(setting: Setting, hidden: int) -> MLP:
    return MLP(
        hidden,
        activation=setting.activation,  # type: ignore[arg-type]
        num_frequencies=setting.num_frequencies,
        base=setting.base,
        **setting.mlp,
    )


def width(setting: Setting, hidden: int, layers: Sequence[tuple[int, int]]) -> int:
    """The largest hidden width of at most as many parameters as the default has with width `hidden`."""

    def params(width: int) -> int:
        mlp = _mlp(setting, width)
        mlp.bind(layers)
        return mlp.num_params

    return bisect_right(range(4 * hidden), MLP(hidden).num_params, lo=1, key=params) - 1


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
    mlp = _mlp(setting, width(setting, hidden, _layers(original)))
    whole = Representation(original, mlp, order=setting.order, standardize=setting.standardize, tune_kept="affine")
    average = AveragedModel(mlp, multi_avg_fn=get_ema_multi_avg_fn(setting.ema)) if setting.ema else None
    optimizer = build_optimizer(setting, mlp.parameters())
    schedule = WarmupCosine(optimizer, setting.warmup_steps, total_steps=steps)
    smallest = 2 / (1 + setting.batch_growth)
    largest = round(setting.batch_size * smallest * setting.batch_growth)
    sampling: Sampling = {"uniform": Uniform, "magnitude": MagnitudeMix}[setting.sampling](largest)
    norms, mask = whole.target.flatten(1).norm(dim=1), whole.learned.mask()
    units = _layer_scales(whole) if setting.scale_layers else torch.ones(len(norms), 1, 1)
    errors_NKK = _error_weights(original, setting.sensitivity, images)
    shares_N = None if errors_NKK is None else errors_NKK.mean((1, 2))
    if errors_NKK is not None and setting.level != "entry":
        errors_NKK = _averaged(whole, errors_NKK, setting.level == "layer")
    if setting.sampled:
        errors_NKK = None
    seconds, curve = 0.0, []
    for step in range(steps):
        began = time.perf_counter()
        batch = round(largest * (1 / setting.batch_growth + (1 - 1 / setting.batch_growth) * step / steps))
        rows = sampling.indices(norms, seed, step)[:batch]
        if setting.sampled:
            assert shares_N is not None
            rows = torch.multinomial(shares_N, len(rows), replacement=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=setting.precision == "bf16"):
            predicted = whole.kernels(rows) * units[rows]
        part = whole.learned.mask(rows)
        weights, count = part, None if part is None else float(part.sum())
        if errors_NKK is not None:
            powers_NKK = errors_NKK ** (1 - step / steps) * (errors_NKK > 0) if setting.anneal else errors_NKK
            weights = powers_NKK[rows] * (whole.layout.num_weights / powers_NKK.sum())
            count = count or float(weights.numel())
        error = reconstruction_mse(predicted / whole.scale, whole.target[rows] / whole.scale, weights, count)
        optimizer.zero_grad()
        (error.sqrt() if setting.loss == "rmse" else error).backward()
        optimizer.step()
        schedule.step()
        if average is not None:
            average.update_parameters(mlp)
        seconds += time.perf_counter() - began
        if (step + 1) % max(1, steps // _POINTS) == 0 or step == steps - 1:
            with torch.no_grad():
                table = whole.kernels(predictor=mlp if average is None else average.module) * units
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
    return Measured(images, Representation(original, MLP(8)))


@cache
def _error_weights(original: Original, sensitivity: Sensitivity, images: Path | None) -> Tensor | None:
    if sensitivity.kind == "none":
        return None
    if images is None:
        raise SystemExit("a setting with a sensitivity needs --images DIR")
    data = CIFAR10DataModule(str(images))
    return error_weights(Representation(original, MLP(8)), sensitivity, sensitivity.images(data))


def _averaged(whole: Representation, errors_NKK: Tensor, by_layer: bool) -> Tensor:
    """The mean error weight of each kernel, or of its layer, for all of its entries."""
    means_N = errors_NKK.mean((1, 2))
    if by_layer:
        means_N = torch.cat([means_N[layer.rows].mean().expand(layer.kernels) for layer in whole.layout.layers])
    return means_N[:, None, None].expand_as(errors_NKK)


def _layer_scales(whole: Representation) -> Tensor:
    """Of every kernel, its layer's root mean square over that of all weights, shape (N, 1, 1)."""
    layers = [whole.target[layer.rows].square().sum().div(layer.weights).sqrt() for layer in whole.layout.layers]
    kernels = torch.tensor([layer.kernels for layer in whole.layout.layers])
    return (torch.stack(layers) / whole.scale).repeat_interleave(kernels).view(-1, 1, 1)


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
    parser.add_argument("--out", type=Path, default=Path("runs/study"))
    options = parser.parse_args()
    network, _, file = options.original.partition("=")
    original = Original(network, checkpoint=file)
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
