"""What every predictor promises."""

from abc import ABC, abstractmethod

from torch import Tensor, nn


class Predictor(nn.Module, ABC):
    """Maps addresses to kernels.

    To be trained by Progressive, a module with parameters of its own needs a method `reset_parameters`, as those of
    torch have.

    Args:
        kernel_size: Side K of the kernels that come out; a layer with smaller kernels takes the centre crop.
    """

    def __init__(self, kernel_size: int = 3) -> None:
        super().__init__()
        self.kernel_size = kernel_size

    @abstractmethod
    def bind(self, extent: tuple[int, int, int]) -> None:
        """Prepare for addresses below `extent` = (layers, filters, channels); called once, by the representation."""

    @abstractmethod
    def forward(self, addresses_N3: Tensor) -> Tensor:
        """Kernels (N, K, K) of the addresses (N, 3): layer number, filter position, channel position (integers)."""

    @property
    def num_params(self) -> int:
        """Parameters that have to be stored."""
        return sum(p.numel() for p in self.parameters())
