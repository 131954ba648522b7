"""Compiled predictors: a fit that differs in nothing but speed."""

from typing import Literal, final

import lightning as L

from nernlit.predictors import Predictor, PredictorEnsemble


@final
class Compile(L.Callback):
    """Run the predictors of a fit through `torch.compile`; checkpoints stay what they are.

    On a CPU it gains nothing over the predictors as they are. On a GPU small predictors are bound by the launches of
    kernels, which `reduce-overhead` replaces by CUDA graphs.

    Args:
        mode: torch's.
    """

    def __init__(self, mode: Literal["default", "reduce-overhead", "max-autotune"] = "default") -> None:
        self.mode = mode

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        modules = list(pl_module.modules())
        # Trials run their predictors by `vmap`, which goes into compiled code and not around it.
        inside = {predictor for trials in modules if isinstance(trials, PredictorEnsemble) for predictor in trials.each}
        for module in modules:
            if isinstance(module, Predictor | PredictorEnsemble) and module not in inside:
                module.compile(mode=self.mode)
