"""Compiled predictors, for speed."""

from typing import Literal, final

import lightning as L

from nernlit.errors import UsageError
from nernlit.predictors import Predictor, PredictorEnsemble


@final
class Compile(L.Callback):
    """Compile the predictors of a fit with `torch.compile`. Checkpoints do not change.

    On a CPU this is not faster. On a GPU small predictors are limited by kernel launches, which `reduce-overhead`
    replaces by CUDA graphs.

    Args:
        mode: The mode of `torch.compile`.

    Raises:
        UsageError: In `setup`, if there is no predictor, or one changes after optimizer steps.
    """

    def __init__(self, mode: Literal["default", "reduce-overhead", "max-autotune"] = "default") -> None:
        self.mode = mode

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        modules = list(pl_module.modules())
        if not any(isinstance(module, Predictor) for module in modules):
            raise UsageError(f"Compile compiles predictors, and {type(pl_module).__name__} has none; leave it out.")
        # An ensemble calls its predictors through `vmap`, which can be compiled but cannot map compiled modules.
        inside = {predictor for trials in modules if isinstance(trials, PredictorEnsemble) for predictor in trials.each}
        for module in modules:
            if isinstance(module, Predictor) and module.changes_after_steps:
                raise UsageError(
                    f"Compile: {type(module).__name__} reads its gradients to change codes during training (move above "
                    "0), which compiled code does not allow; pass move: 0, or remove the callback."
                )
            if isinstance(module, Predictor | PredictorEnsemble) and module not in inside:
                module.compile(mode=self.mode)
