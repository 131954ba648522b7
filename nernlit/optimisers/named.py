"""Any optimiser of timm by its name."""

from typing import Any

from timm.optim import create_optimizer_v2
from torch.nn import Parameter
from torch.optim import Optimizer


def timm_optimizer(
    params: list[Parameter],
    name: str,
    lr: float,
    weight_decay: float = 0.0,
    momentum: float = 0.9,
    options: dict[str, Any] | None = None,
) -> Optimizer:
    """An optimiser from timm's registry, for example `lookahead_radam` (Ranger 2019, NeRN's).

    Args:
        params: What is trained.
        name: As in `timm.optim.list_optimizers()`; the prefix `lookahead_` wraps any of them.
        lr: Learning rate.
        weight_decay: Decay of every parameter.
        momentum: Where the optimiser has one.
        options: Further arguments of the optimiser, for example `{betas: [0.5, 0.999]}`.

    >>> optimizer = timm_optimizer([Parameter(torch.ones(2))], "lookahead_radam", lr=5e-3)
    >>> type(optimizer).__name__
    'Lookahead'
    """
    optimizer: Optimizer = create_optimizer_v2(
        params, opt=name, lr=lr, weight_decay=weight_decay, momentum=momentum, **(options or {})
    )
    return optimizer
