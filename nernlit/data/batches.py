"""Batches of numbers: seeded by the epoch, shared out over processes, nothing padded or repeated in evaluation."""

from collections.abc import Callable, Iterator
from typing import final

import torch
from torch.utils.data import Sampler


@final
class BatchNumbers(Sampler[list[int]]):
    """Lists of item numbers for one process.

    Training shuffles anew every epoch and drops what does not fill a batch on all processes, so that all make the same
    number of steps; evaluation sees every item exactly once over all processes.

    Args:
        size: Items in the dataset.
        batch_size: Items a batch and process.
        training: Shuffle and drop the rest.
        seed: Of the shuffles, equal on all processes.
        rank: Of this process.
        world_size: Number of processes.
    """

    def __init__(
        self, size: int, batch_size: int, training: bool, seed: int = 0, rank: int = 0, world_size: int = 1
    ) -> None:
        self.size, self.training, self.seed = size, training, seed
        #: Tells the epoch's number. Not `set_epoch`: with max_steps and after a resumption Lightning is one off there.
        self.epoch_of: Callable[[], int] = lambda: 0
        self.batch_size = min(batch_size, max(1, size // world_size)) if training else batch_size
        self.rank, self.world_size = rank, world_size

    def __len__(self) -> int:
        if self.training:
            return self.size // (self.batch_size * self.world_size)
        own = len(range(self.rank, self.size, self.world_size))
        return -(-own // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        if self.training:
            generator = torch.Generator().manual_seed((self.seed + self.epoch_of() * 1_000_003) % 2**63)
            numbers = torch.randperm(self.size, generator=generator)
        else:
            numbers = torch.arange(self.size)
        own = numbers[self.rank :: self.world_size].tolist()
        for batch in range(len(self)):
            yield own[batch * self.batch_size : (batch + 1) * self.batch_size]
