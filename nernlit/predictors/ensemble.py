"""Several predictors of the same architecture, trained in one step."""

import copy
from typing import final

import torch
from torch import Tensor, nn
from torch.func import functional_call

from nernlit.errors import UsageError
from nernlit.predictors.base import Predictor
from nernlit.predictors.quantized import Quantized


@final
class PredictorEnsemble(nn.Module):
    """Predictors that differ only in their parameters; Progressive trains one per trial.

    Each has its own parameters, so an optimizer updates a trial exactly as if it were trained alone. On an accelerator
    the parameters are stacked, and every matrix product has a leading trial dimension. Quantized predictors run one
    after another, because `torch.vmap` does not support the custom gradient of quantization; so do all predictors on a
    CPU, where one trial uses all cores and stacking would only add copies.

    Args:
        predictor: A predictor after `bind`; it is copied.
        count: Number of trials, T.

    Raises:
        UsageError: If the predictor changes after optimizer steps: trials may differ in parameters only.
    """

    def __init__(self, predictor: Predictor, count: int) -> None:
        super().__init__()
        if predictor.changes_after_steps:
            raise UsageError(
                f"{type(predictor).__name__} changes its codes during training (move above 0), which Progressive's "
                "trials cannot; pass move: 0."
            )
        self.each = nn.ModuleList(copy.deepcopy(predictor) for _ in range(count))

    def reset(self, *seeds: int) -> None:
        """Initialize each trial again from its seed; torch's global random state does not change.

        Raises:
            UsageError: If a module with parameters has no `reset_parameters`.
        """
        for name, module in self.each[0].named_modules():
            if next(module.parameters(recurse=False), None) is not None and not hasattr(module, "reset_parameters"):
                what = ".".join([type(self.each[0]).__name__, *filter(None, [name])])
                raise UsageError(
                    f"{what} cannot be initialized again; add a method reset_parameters() to {type(module).__name__}."
                )
        devices = {p.device for p in self.parameters() if p.device.type == "cuda"}
        for predictor, seed in zip(self.each, seeds, strict=True):
            with torch.random.fork_rng([device.index or 0 for device in devices]):
                torch.manual_seed(seed)
                for module in predictor.modules():
                    if callable(reset := getattr(module, "reset_parameters", None)):
                        reset()
                if isinstance(predictor, Quantized):
                    predictor.reset_parameters()  # again: step sizes depend on the parameters

    def forward(self, addresses_N3: Tensor) -> Tensor:
        """Kernels (T, N, K, K)."""
        one_by_one = len(self.each) == 1 or isinstance(self.each[0], Quantized)
        if addresses_N3.device.type == "cpu" or one_by_one:
            return torch.stack([predictor(addresses_N3) for predictor in self.each])
        return self.batched(addresses_N3)

    def batched(self, addresses_N3: Tensor) -> Tensor:
        """`forward` with stacked parameters, on any device."""
        first = self.each[0]
        named = [dict(predictor.named_parameters()) for predictor in self.each]
        stacked = {name: torch.stack([parameters[name] for parameters in named]) for name in named[0]}
        kernels_TNKK: Tensor = torch.vmap(lambda parameters: functional_call(first, parameters, (addresses_N3,)))(
            stacked
        )
        return kernels_TNKK
