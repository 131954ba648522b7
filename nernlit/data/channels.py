"""Image channels: 1 (gray), 3 (RGB) or 4 (RGB and alpha), and how one becomes another, as PIL does it."""

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from nernlit.errors import DataError

#: Channels -> PIL's mode.
MODES: Mapping[int, str] = MappingProxyType({1: "L", 3: "RGB", 4: "RGBA"})


def require_channels(channels: int) -> None:
    """Check a number of channels.

    Raises:
        DataError: If it is not 1, 3 or 4.
    """
    if channels not in MODES:
        raise DataError(
            f"the original takes images of {channels} channels; data modules read images in 1 (gray), 3 (RGB) or "
            "4 (RGB and alpha). Use an original with in_chans=1, 3 or 4, or a data module of your own."
        )


def to_channels(images_BCHW: Tensor, channels: int) -> Tensor:
    """The images with that many channels: gray is repeated, colors are weighted (ITU-R 601), alpha is opaque.

    Args:
        images_BCHW: uint8 pixels of 1, 3 or 4 channels.
        channels: 1, 3 or 4.

    Raises:
        DataError: If the images have, or are to have, another number of channels.

    >>> to_channels(torch.tensor([255, 0, 0], dtype=torch.uint8).view(1, 3, 1, 1), 1).item()
    76
    """
    require_channels(channels)
    found = images_BCHW.shape[1]
    if found not in MODES:
        raise DataError(f"images of {found} channels cannot be read in {channels}; expected 1, 3 or 4 channels.")
    if found == channels:
        return images_BCHW
    colors = images_BCHW[:, :3]
    if channels == 1:
        # In integers, with PIL's weights: image files and tensors of the same pixels give the same gray.
        weights = torch.tensor([19595, 38470, 7471], device=images_BCHW.device).view(1, 3, 1, 1)
        weighted = (colors.int() * weights).sum(1, keepdim=True)
        return ((weighted + 2**15) >> 16).to(torch.uint8)
    colors = colors.expand(-1, 3, -1, -1)
    return colors if channels == 3 else torch.cat([colors, torch.full_like(colors[:, :1], 255)], dim=1)


def statistics_of(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    """Means or standard deviations for that many channels: the average over the given ones where their number differs.

    >>> statistics_of((0.4, 0.5, 0.6), 1)
    (0.5,)
    """
    return values if len(values) == channels else (sum(values) / len(values),) * channels
