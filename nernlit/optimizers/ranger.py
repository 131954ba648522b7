"""Ranger 2019, the optimizer of NeRN and the paper (Wright 2019): RAdam inside Lookahead."""

from collections.abc import Callable, Iterable
from typing import final

import torch
from timm.optim import Lookahead
from torch.nn import Parameter
from torch.optim import RAdam


@final
class Ranger(Lookahead):  # type: ignore[misc]  # timm is taken as untyped
    """RAdam inside Lookahead, without gradient centralization.

    Lookahead's slow weights start at the initial weights, as in Wright's code; timm's start at those of step k.

    Args:
        params: Parameters to train.
        lr: Learning rate; the default is the paper's.
        betas: Decay rates of RAdam's two moments; the default is the paper's.
        weight_decay: Decoupled weight decay: a step multiplies the weights with 1 - lr * weight_decay; NeRN's default.
        k: Steps between two updates of Lookahead's slow weights.
        alpha: Step size of the slow weights: their share of the way to RAdam's weights.
    """

    def __init__(
        self,
        params: Iterable[Parameter],
        lr: float = 5e-3,
        betas: tuple[float, float] = (0.5, 0.999),
        weight_decay: float = 1e-3,
        k: int = 6,
        alpha: float = 0.5,
    ) -> None:
        # Decoupled weight decay, as in Wright's code. Added to the gradients, a decay of 1e-3 would exceed those of the
        # reconstruction error after a few hundred steps, and the predictor's weights would shrink to zero.
        radam = RAdam(params, lr=lr, betas=(betas[0], betas[1]), weight_decay=weight_decay, decoupled_weight_decay=True)
        super().__init__(radam, alpha=alpha, k=k)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        new = [p for group in self.param_groups if not group["lookahead_step"] for p in group["params"]]
        starts = [parameter.clone() for parameter in new]
        loss: float | None = self._base_optimizer.step(closure)
        for parameter, start in zip(new, starts, strict=True):
            if state := self._base_optimizer.state.get(parameter):  # it had a gradient
                state["lookahead_slow_buff"] = start
        for group in self.param_groups:
            group["lookahead_step"] += 1
            if group["lookahead_step"] % group["lookahead_k"] == 0:
                self.update_slow(group)
        return loss
