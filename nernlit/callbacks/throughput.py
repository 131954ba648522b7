"""The speed of a fit, absolute and relative to that of matrix products."""

import time
from typing import Any, final

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from nernlit.errors import UsageError, require_at_least
from nernlit.predictors import Predictor, PredictorEnsemble

_SIDE = 1024  # of the matrices whose product is timed
_PRODUCTS = 10


@final
class Throughput(L.Callback):
    """Log `throughput/steps_per_s`, `kernels_per_s` and `share_of_matrix_products` of training steps.

    The last one is the predictors' operations per second (2 per parameter and kernel, 6 with a backward pass), divided
    by those of square matrix products in the step's precision on the same device, measured once before the fit.
    Validation time is excluded. Kernels that the backward pass predicts again (in large layers) count twice.

    Args:
        every_n_steps: Steps over which the values are averaged.

    Raises:
        UsageError: At the start of a fit, if there is no predictor.
    """

    def __init__(self, every_n_steps: int = 100) -> None:
        require_at_least(1, every_n_steps=every_n_steps)
        self.every_n_steps = every_n_steps
        self._handles: list[RemovableHandle] = []
        self._steps, self._kernels, self._operations, self._began = 0, 0, 0, 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        kind = torch.bfloat16 if getattr(pl_module, "precision", "fp32") == "bf16" else torch.float32
        self._rate = _matrix_product_rate(pl_module.device, kind)
        found = [module for module in pl_module.modules() if isinstance(module, PredictorEnsemble | Predictor)]
        if not found:
            raise UsageError(f"Throughput measures predictors, and {type(pl_module).__name__} has none; leave it out.")
        inside = {part for module in found for part in module.modules() if part is not module}
        outer = [module for module in found if module not in inside]
        # Of a `Quantized`, the inner one: predictions of many kernels call only that.
        called = [module.unquantized if isinstance(module, Predictor) else module for module in outer]
        self._handles = [module.register_forward_pre_hook(self._note) for module in called]
        self._restart()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for handle in self._handles:
            handle.remove()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self.on_train_end(trainer, pl_module)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._paused, self._before = time.perf_counter(), (self._kernels, self._operations)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._kernels, self._operations = self._before
        self._began += time.perf_counter() - self._paused

    def _restart(self) -> None:
        self._steps, self._kernels, self._operations = 0, 0, 0
        self._began = time.perf_counter()

    def _note(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        predictors = module.each if isinstance(module, PredictorEnsemble) else [module]
        parameters = sum(predictor.num_params for predictor in predictors if isinstance(predictor, Predictor))
        self._kernels += len(inputs[0]) * len(predictors)
        self._operations += (6 if torch.is_grad_enabled() else 2) * parameters * len(inputs[0])

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._steps += 1
        if self._steps < self.every_n_steps:
            return
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self._began
        for name, value in {
            "steps_per_s": self._steps / seconds,
            "kernels_per_s": self._kernels / seconds,
            "share_of_matrix_products": self._operations / seconds / self._rate,
        }.items():
            pl_module.log(f"throughput/{name}", value)
        self._restart()


def _matrix_product_rate(device: torch.device, kind: torch.dtype) -> float:
    """Operations per second of products of square matrices."""
    matrix = torch.ones(_SIDE, _SIDE, device=device, dtype=kind)

    def seconds() -> float:
        began = time.perf_counter()
        for _ in range(_PRODUCTS):
            matrix @ matrix
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    return _PRODUCTS * 2 * _SIDE**3 / min(seconds() for _ in range(3))
