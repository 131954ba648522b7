"""Which images form a batch on which process, and the `DataLoader`s that read them."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, final

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from nernlit.data.sources import ImageSource, TensorImages
from nernlit.errors import DataError, NernlitError


@final
class BatchSampler(DistributedSampler[list[int]]):
    """The indices of each batch of one process, as lists.

    Training shuffles the indices in every epoch and drops those that do not fill a batch on all processes, so that all
    processes make the same number of steps. The processes' batches of a step, one after the other, are the batch that
    one process would have. Evaluation yields every index exactly once over all processes.

    It derives from `DistributedSampler` so that Lightning does not replace it. Lightning's sampler repeats images to
    give every process the same number.

    Args:
        size: Number of items in the dataset.
        batch_size: Items per batch and process.
        training: Whether to shuffle and to drop the last incomplete batch.
        seed: Seed of the shuffles; the same on all processes.
        rank: Index of this process.
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
        items: Any = range(size)  # stands for the dataset, of which only the length is used
        super().__init__(items, world_size, rank, shuffle=training, seed=seed, drop_last=training)
        self.size, self.training = size, training
        #: Returns the index of the epoch: by default, the number of passes so far. `set_epoch` is not used: with
        #: max_steps, and after resuming, Lightning's argument is off by one.
        self.epoch_of: Callable[[], int] = lambda: self._passes
        self._passes = 0
        #: Returns the number of batches of the epoch that were trained on before the fit was interrupted.
        self.seen: Callable[[], int] = lambda: 0
        self.batch_size = min(batch_size, size // world_size) if training else batch_size

    def __len__(self) -> int:
        if self.training:
            return self.size // (self.batch_size * self.num_replicas)
        own = len(range(self.rank, self.size, self.num_replicas))
        return -(-own // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        if not self.training:
            own = torch.arange(self.size)[self.rank :: self.num_replicas]
            yield from (batch.tolist() for batch in own.split(self.batch_size))
            return
        generator = torch.Generator().manual_seed((self.seed + self.epoch_of() * 1_000_003) % 2**63)
        self._passes += 1
        numbers = torch.randperm(self.size, generator=generator)
        joint = self.batch_size * self.num_replicas
        for batch in range(self.seen(), len(self)):
            yield numbers[batch * joint :][:joint].tensor_split(self.num_replicas)[self.rank].tolist()


@final
class ErrorsAsBatches(Dataset[tuple[Tensor, ...] | NernlitError]):
    """A source that returns a user-fixable error in place of a batch, for the main process to raise.

    A `DataLoader` would wrap an error of a worker process in a long traceback.
    """

    def __init__(self, source: "ImageSource | Numbered") -> None:
        self.source = source

    def __getitem__(self, indices: Sequence[int]) -> tuple[Tensor, ...] | NernlitError:
        try:
            return self.source[indices]
        except NernlitError as error:
            return error

    def __len__(self) -> int:
        return len(self.source)


@final
class Numbered(Dataset[tuple[Tensor, Tensor, Tensor]]):
    """A source whose batches also have the images' numbers (B,): their places in the source."""

    def __init__(self, source: ImageSource) -> None:
        self.source = source

    def __getitem__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        return (*self.source[indices], torch.as_tensor(indices))

    def __len__(self) -> int:
        return len(self.source)


def image_loader(
    source: ImageSource,
    batch_size: int,
    training: bool,
    seed: int,
    num_workers: int,
    trainer: L.Trainer | None,
    numbered: bool = False,
) -> DataLoader[Any]:
    """A loader of this process's batches: uint8 pixels (B, C, H, W) and labels (B,).

    Args:
        source: The images.
        batch_size: Images per batch and process.
        training: Whether to shuffle and to drop the last incomplete batch.
        seed: Seed of the shuffles; the same on all processes.
        num_workers: Processes that decode images which are not in memory.
        trainer: Knows the processes, the epoch and the position in it; None reads all images in this process.
        numbered: Whether batches also have the images' numbers in the source, (B,).

    Raises:
        DataError: If there are fewer images than processes.
    """
    rank, world_size = (trainer.global_rank, trainer.world_size) if trainer is not None else (0, 1)
    # Lightning would skip an evaluation on the processes without images, and the others would wait for them.
    require_enough(len(source), world_size)
    sampler = BatchSampler(len(source), batch_size, training, seed, rank, world_size)
    if trainer is not None:
        sampler.epoch_of = lambda: trainer.current_epoch
        if training:
            sampler.seen = lambda: _trained_batches(trainer)
    workers = 0 if isinstance(source, TensorImages) else num_workers
    dataset = Numbered(source) if numbered else source
    return DataLoader(
        ErrorsAsBatches(dataset) if workers else dataset, batch_size=None, sampler=sampler, num_workers=workers
    )


def require_enough(images: int, world_size: int) -> None:
    """Refuse to share images among more processes than there are images.

    Raises:
        DataError: If there are fewer images than processes.
    """
    if images < world_size:
        raise DataError(
            f"{images} images cannot be shared by {world_size} processes; lower --trainer.devices, or use more images."
        )


def step_loader(steps: int) -> DataLoader[Any]:
    """A loader of `steps` batches that hold only their own index; every process gets all of them."""
    items: Any = range(steps)
    sampler: DistributedSampler[int] = DistributedSampler(items, num_replicas=1, rank=0, shuffle=False)
    return DataLoader(items, batch_size=None, sampler=sampler)


def _trained_batches(trainer: L.Trainer) -> int:
    """The number of batches of the current epoch that a resumed fit has already trained on."""
    loop = trainer.fit_loop
    return loop.epoch_loop.batch_progress.current.ready if loop.restarting else 0
