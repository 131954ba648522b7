"""Batches of numbers: seeded by the epoch, shared out over processes, nothing padded or repeated in evaluation."""

from collections.abc import Callable, Iterator, Sequence
from typing import final

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from nernlit.data.sources import ImageSource
from nernlit.errors import DataError, NernlitError


@final
class BatchSampler(Sampler[list[int]]):
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

    Raises:
        DataError: If there are fewer training items than processes.
    """

    def __init__(
        self, size: int, batch_size: int, training: bool, seed: int = 0, rank: int = 0, world_size: int = 1
    ) -> None:
        if training and size < world_size:
            raise DataError(
                f"{size} training images cannot be shared by {world_size} processes; lower --trainer.devices."
            )
        self.size, self.training, self.seed = size, training, seed
        #: Tells the epoch's number. Not `set_epoch`: with max_steps and after a resumption Lightning is one off there.
        self.epoch_of: Callable[[], int] = lambda: 0
        #: Tells how many batches of the epoch were seen before the fit was interrupted.
        self.seen: Callable[[], int] = lambda: 0
        self.batch_size = min(batch_size, size // world_size) if training else batch_size
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
        for batch in range(self.seen(), len(self)):
            yield own[batch * self.batch_size : (batch + 1) * self.batch_size]


@final
class ErrorsAsBatches(Dataset[tuple[Tensor, Tensor] | NernlitError]):
    """A source whose user-fixable errors are returned as batches, for the main process to raise.

    A loader would turn an error of a worker process into a traceback of many lines.
    """

    def __init__(self, source: ImageSource) -> None:
        self.source = source

    def __getitem__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor] | NernlitError:
        try:
            return self.source[indices]
        except NernlitError as error:
            return error

    def __len__(self) -> int:
        return len(self.source)
