"""The settings of the study: the default of Recon-only, and changes of it."""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import timm.optim
from torch.nn import Parameter
from torch.optim import Optimizer

from nernlit.kernels import OrderName
from nernlit.optimizers import Ranger
from nernlit.predictors import MLP
from nernlit.training.sensitivity import NO_SENSITIVITY, Sensitivity

#: What has one error weight: the mean of its entries.
Level = Literal["entry", "kernel", "filter", "layer"]


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
    sampling: Literal["uniform", "magnitude", "all"] = "uniform"
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
    level: Level = "entry"
    sampled: bool = False  # kernels are drawn in proportion to their error weights, and errors count alike
    scaled: bool = False  # outputs in units of 1 / sqrt(error weight) of their level, `filter` or `layer`
    scaled_order: bool = False  # the order of the kernels times the square roots of their error weights
    #: Exponent of Kronecker factors of the Fisher information, the quadratic form of errors.
    factors: float = 0.0


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
    "fisher 0.5": Setting(sensitivity=Sensitivity("fisher", 0.5)),
    "activation 0.35": Setting(sensitivity=Sensitivity("activation", 0.35)),
    "fisher 0.35, annealed": Setting(sensitivity=Sensitivity("fisher", 0.35), anneal=True),
    "batchnorm 0.35": Setting(sensitivity=Sensitivity("batchnorm", 0.35)),
    "fisher 0.35 per kernel": Setting(sensitivity=Sensitivity("fisher", 0.35), level="kernel"),
    "fisher 0.35 per layer": Setting(sensitivity=Sensitivity("fisher", 0.35), level="layer"),
    "fisher 0.35, sampled": Setting(sensitivity=Sensitivity("fisher", 0.35), sampled=True),
    "fisher 0.35, 64 images": Setting(sensitivity=Sensitivity("fisher", 0.35, num_images=64)),
    "fisher 0.35, 8192 images": Setting(sensitivity=Sensitivity("fisher", 0.35, num_images=8192)),
    "fisher 0.35, scaled by layer": Setting(sensitivity=Sensitivity("fisher", 0.35), level="layer", scaled=True),
    "fisher 0.35, scaled by filter": Setting(sensitivity=Sensitivity("fisher", 0.35), level="filter", scaled=True),
    "fisher 0.35, scaled order": Setting(sensitivity=Sensitivity("fisher", 0.35), scaled_order=True),
    "all kernels": Setting(sampling="all"),
    "fisher 0.35, all kernels": Setting(sensitivity=Sensitivity("fisher", 0.35), sampling="all"),
    "Kronecker factors 0.2": Setting(factors=0.2, sampling="all"),
    "Kronecker factors 0.35": Setting(factors=0.35, sampling="all"),
    "Kronecker factors 0.5": Setting(factors=0.5, sampling="all"),
    "Kronecker factors 1": Setting(factors=1.0, sampling="all"),
    "kronecker 0.35": Setting(sensitivity=Sensitivity("kronecker", 0.35)),
    "kronecker 0.5": Setting(sensitivity=Sensitivity("kronecker", 0.5)),
    "kronecker 0.35, 12 frequencies": Setting(sensitivity=Sensitivity("kronecker", 0.35), num_frequencies=12, base=0.7),
    "kronecker 0.5, 12 frequencies": Setting(sensitivity=Sensitivity("kronecker", 0.5), num_frequencies=12, base=0.7),
    "kronecker 0.35, 12 frequencies, 16,384 kernels": Setting(
        sensitivity=Sensitivity("kronecker", 0.35), num_frequencies=12, base=0.7, batch_size=2**14
    ),
    "Kronecker factors 0.35, 12 frequencies": Setting(factors=0.35, sampling="all", num_frequencies=12, base=0.7),
    "Kronecker factors 0.5, 12 frequencies": Setting(factors=0.5, sampling="all", num_frequencies=12, base=0.7),
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


def build_mlp(setting: Setting, hidden: int) -> MLP:
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
        mlp = build_mlp(setting, width)
        mlp.bind(layers)
        return mlp.num_params

    return bisect_right(range(4 * hidden), MLP(hidden).num_params, lo=1, key=params) - 1
