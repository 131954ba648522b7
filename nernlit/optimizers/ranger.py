"""Ranger 2019, the optimizer of NeRN and the paper (Wright 2019): RAdam inside Lookahead."""

from collections.abc import Iterable
from typing import final

from timm.optim import Lookahead
from torch.nn import Parameter
from torch.optim import RAdam


@final
class Ranger(Lookahead):  # type: ignore[misc]  # timm is taken as untyped
    """RAdam inside Lookahead, without gradient centralization.

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
