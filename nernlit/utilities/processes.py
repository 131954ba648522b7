"""The processes that share a piece of work."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Processes:
    """The processes that share a piece of work; by default there is one.

    Attributes:
        rank: Index of this process.
        world_size: Number of processes.
        total: Sums a tensor over all processes, which call it at the same time. All of them get the same result.
    """

    rank: int = 0
    world_size: int = 1
    total: Callable[[Tensor], Tensor] = torch.positive

    @classmethod
    def from_trainer(cls, trainer: Any) -> Self:
        """The processes of a Lightning trainer."""
        return cls(trainer.global_rank, trainer.world_size, partial(trainer.strategy.reduce, reduce_op="sum"))


#: This process alone.
ALONE = Processes()
