"""Sampling: the choice of the kernels of a training step.

A sample is a pure function of (seed, step), and each process takes its share of it. So a resumed run samples the same
kernels as an uninterrupted one, and W processes with batches of B kernels sample the same kernels as one process with
batches of W * B.
"""

from abc import ABC, abstractmethod
from typing import final

import torch
from torch import Tensor

from nernlit.errors import UsageError


def derive_seed(*key: int) -> int:
    """A seed computed from several integers, equal on all machines; different keys almost always differ."""
    seed = 0
    for part in key:
        seed = (seed * 0x9E3779B97F4A7C15 + part + 1) % 2**63
    return seed


def _generator(*key: int) -> torch.Generator:
    return torch.Generator().manual_seed(derive_seed(*key))


class Sampling(ABC):
    """Chooses the rows of the kernel table that a training step predicts and compares.

    Args:
        batch_size: Kernels per step and process.
    """

    def __init__(self, batch_size: int = 4096) -> None:
        if batch_size < 1:
            raise UsageError(f"batch_size={batch_size} kernels per step; expected at least 1.")
        self.batch_size = batch_size

    @abstractmethod
    def joint(self, norms_N: Tensor, seed: int, step: int, count: int) -> Tensor:
        """The row numbers (int64) of a step, of all processes together.

        Args:
            norms_N: See `shares`.
            seed: See `shares`.
            step: See `shares`.
            count: How many rows to choose, N at most; `AllKernels` takes all N in any case.
        """

    def indices(self, norms_N: Tensor, seed: int, step: int, rank: int = 0, world_size: int = 1) -> Tensor:
        """The row numbers (int64) of one process in a step; see `shares`."""
        return self.shares(norms_N, seed, step, world_size)[rank]

    def shares(self, norms_N: Tensor, seed: int, step: int, world_size: int = 1) -> tuple[Tensor, ...]:
        """The row numbers (int64) of each process in a step; some are empty if there are fewer rows than processes.

        Args:
            norms_N: The Euclidean norms of all kernels, on the CPU.
            seed: The seed of the run, equal on all processes.
            step: The step's number, counted over the whole run.
            world_size: Number of processes.
        """
        return self.joint(norms_N, seed, step, self.batch_size * world_size).tensor_split(world_size)


@final
class Uniform(Sampling):
    """Epochs over all kernels without replacement, each in a new random order; an epoch may end within a batch."""

    def __init__(self, batch_size: int = 4096) -> None:
        super().__init__(batch_size)
        self._kept: tuple[tuple[int, int, int], Tensor] | None = None

    def joint(self, norms_N: Tensor, seed: int, step: int, count: int) -> Tensor:
        size = len(norms_N)
        count = min(count, size)
        first = step * count
        last = first + count - 1
        parts = [self._pass(size, seed, number) for number in range(first // size, last // size + 1)]
        self._kept = ((size, seed, last // size), parts[-1])
        offset = first % size
        return torch.cat(parts)[offset : offset + count]

    def _pass(self, size: int, seed: int, number: int) -> Tensor:
        if self._kept is not None and self._kept[0] == (size, seed, number):
            return self._kept[1]
        return torch.randperm(size, generator=_generator(seed, number))


@final
class MagnitudeMix(Sampling):
    """NeRN's sampling: uniform with probability `uniform_share`, else kernels drawn in proportion to their norm.

    Draws by norm are with replacement (NeRN, arXiv 2212.13554, section 3.3; arXiv 2407.00356, appendix D.2).
    """

    def __init__(self, batch_size: int = 4096, uniform_share: float = 0.8) -> None:
        super().__init__(batch_size)
        if not 0 <= uniform_share <= 1:
            raise UsageError(f"uniform_share={uniform_share}; expected a probability between 0 and 1.")
        self.uniform_share = uniform_share
        self._uniform = Uniform(batch_size)
        self._summed: tuple[Tensor, Tensor] | None = None  # norms and their cumulative sums

    def joint(self, norms_N: Tensor, seed: int, step: int, count: int) -> Tensor:
        generator = _generator(seed, step, 1)
        if torch.rand((), generator=generator) < self.uniform_share:
            return self._uniform.joint(norms_N, seed, step, count)
        count = min(count, len(norms_N))
        if self._summed is None or self._summed[0] is not norms_N:
            self._summed = norms_N, norms_N.double().cumsum(0)  # cached: there may be millions of kernels
        ends = self._summed[1]
        drawn = torch.rand(count, generator=generator, dtype=torch.float64) * ends[-1]
        return torch.searchsorted(ends, drawn, right=True).clamp_max(len(ends) - 1)


@final
class AllKernels(Sampling):
    """Every kernel in every step, divided among the processes."""

    def __init__(self) -> None:
        super().__init__()

    def joint(self, norms_N: Tensor, seed: int, step: int, count: int) -> Tensor:
        return torch.arange(len(norms_N))
