"""Several predictors of one form, trained in one step."""

import copy
from typing import final

import torch
from torch import Tensor, nn
from torch.func import functional_call

from nernlit.errors import UsageError
from nernlit.predictors.base import Predictor


@final
class PredictorEnsemble(nn.Module):
    """Predictors that differ only in their parameters.

    Each keeps parameters of its own, so that an optimizer treats a trial exactly as it would alone. On an accelerator
    they are stacked, and every matrix product has a leading trial dimension; on a CPU, which one trial fills, stacking
    would only cost copies, and they run one after another.

    Args:
        predictor: The form; it is copied, and bound already.
        count: Number of trials, T.
    """

    def __init__(self, predictor: Predictor, count: int) -> None:
        super().__init__()
        self.each = nn.ModuleList(copy.deepcopy(predictor) for _ in range(count))

    def reset(self, *seeds: int) -> None:
        """Start every trial anew from a seed of its own; torch's global randomness is left alone.

        Raises:
            UsageError: If a module with parameters has no `reset_parameters`.
        """
        for name, module in self.each[0].named_modules():
            if next(module.parameters(recurse=False), None) is not None and not hasattr(module, "reset_parameters"):
                what = ".".join([type(self.each[0]).__name__, *filter(None, [name])])
                raise UsageError(f"{what} cannot start anew; give {type(module).__name__} a method reset_parameters().")
        devices = {p.device for p in self.parameters() if p.device.type == "cuda"}
        for predictor, seed in zip(self.each, seeds, strict=True):
            with torch.random.fork_rng([device.index or 0 for device in devices]):
                torch.manual_seed(seed)
                for module in predictor.modules():
                    if callable(reset := getattr(module, "reset_parameters", None)):
                        reset()

    def forward(self, addresses_N3: Tensor) -> Tensor:
        """Kernels (T, N, K, K)."""
        if addresses_N3.device.type == "cpu" or len(self.each) == 1:
            return torch.stack([predictor(addresses_N3) for predictor in self.each])
        return self.batched(addresses_N3)

    def batched(self, addresses_N3: Tensor) -> Tensor:
        """`forward` by stacked parameters, whatever the device."""
        first = self.each[0]
        named = [dict(predictor.named_parameters()) for predictor in self.each]
        stacked = {name: torch.stack([parameters[name] for parameters in named]) for name in named[0]}
        kernels_TNKK: Tensor = torch.vmap(lambda parameters: functional_call(first, parameters, (addresses_N3,)))(
            stacked
        )
        return kernels_TNKK
