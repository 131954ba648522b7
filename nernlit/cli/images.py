"""The images of `analyze` and `report`, and the device on which networks classify them."""

import argparse
import copy
from collections.abc import Iterator, Mapping
from typing import final

import torch
from torch import Tensor, nn

from nernlit.cli.arguments import CommandParser
from nernlit.data import ImageDataModule, ImageSource
from nernlit.originals import Original

Batch = tuple[Tensor, Tensor]


@final
class Batches:
    """Pixels (B, C, H, W) in [0, 1] and labels (B,) of images, which are decoded in every pass and not kept.

    Args:
        data: Says how many images are a batch, and how many processes decode them.
        source: The images.
    """

    def __init__(self, data: ImageDataModule, source: ImageSource) -> None:
        self._data, self._loader = data, data.loader(source)

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._loader:
            yield self._data.on_after_batch_transfer(batch, 0)

    def __len__(self) -> int:
        return len(self._loader)


@final
class OnDevice(nn.Module):
    """A copy of a network on a device. Inputs and weights may be on any device; the logits are on the CPU.

    Args:
        original: The network; it stays where it is.
        device: The device.
    """

    def __init__(self, original: Original, device: torch.device) -> None:
        super().__init__()
        self.network = original if device.type == "cpu" else copy.deepcopy(original).to(device)
        self.device = device
        self._given: Mapping[str, Tensor] = {}
        self._moved: dict[str, Tensor] = {}

    def forward(self, images_BCHW: Tensor, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """Logits (B, C) of pixels in [0, 1], with other weights than the network's own where they are given."""
        if weights is not None and weights is not self._given:  # otherwise every batch would move them
            self._given = weights
            self._moved = {key: value.to(self.device) for key, value in weights.items()}
        logits_BC: Tensor = self.network(images_BCHW.to(self.device), self._moved if weights is not None else None)
        return logits_BC.cpu()


def add_device(parser: CommandParser) -> None:
    """Add `--device`, which is None where it is not given."""
    parser.add_argument(
        "--device",
        type=_device,
        help="where networks classify images: auto (the default: torch's accelerator if there is one, else cpu), "
        "cpu, cuda, cuda:1, mps, ...",
    )


def chosen_device(given: torch.device | None) -> torch.device:
    """The device of the option `--device`."""
    return _device("auto") if given is None else given


def _device(text: str) -> torch.device:
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if text == "auto":
        return found or torch.device("cpu")
    try:
        device = torch.device(text)
        torch.zeros((), device=device).cpu()
    except Exception as error:  # each backend has its own
        reason = next(iter(str(error).splitlines()), type(error).__name__).rstrip(".")
        usable = "auto or cpu" if found is None else f"auto, cpu or {found}"
        raise argparse.ArgumentTypeError(f"{text} ({reason}); expected {usable} on this machine") from error
    return device
