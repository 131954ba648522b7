"""Ranger 2019, the optimizer of NeRN and the paper (Wright 2019): RAdam inside Lookahead."""

from collections.abc import Iterable
from typing import final

from timm.optim import Lookahead
from torch.nn import Parameter
from torch.optim import RAdam


@final
class Ranger(Lookahead):  # type: ignore[misc]  # timm is taken as untyped
    """RAdam whose weights move halfway to where it went, every few steps; without gradient centralisation.

    Args:
        params: What is trained.
        lr: Learning rate; the paper's default.
        betas: Of RAdam's two moments; the paper's default.
        weight_decay: Share of the weights, times `lr`, that a step takes away; NeRN's default.
        k: Steps between Lookahead's moves.
        alpha: Share of the way that a move goes.
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
        # Decoupled, as in Wright's code: added to gradients instead, 1e-3 outweighs those of a reconstruction error
        # within some hundred steps, and the predictor shrinks to nothing.
        radam = RAdam(params, lr=lr, betas=(betas[0], betas[1]), weight_decay=weight_decay, decoupled_weight_decay=True)
        super().__init__(radam, alpha=alpha, k=k)
