"""Corruptions of whole batches at five severities. They differ from those of CIFAR-C and ImageNet-C.

Shapes: B images of uint8 pixels (C, H, W), on the CPU. The corruption of an image depends on the image, the severity
and the image's own generator, not on the other images of the batch.
"""

import io
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional

Corruption = Callable[[Tensor, float, Sequence[torch.Generator]], Tensor]


def _gaussian_noise(images_BCHW: Tensor, sigma: float, generators: Sequence[torch.Generator]) -> Tensor:
    noise = torch.stack([torch.randn(images_BCHW.shape[1:], generator=generator) for generator in generators])
    return images_BCHW + 255 * sigma * noise


def _impulse_noise(images_BCHW: Tensor, share: float, generators: Sequence[torch.Generator]) -> Tensor:
    """Salt and pepper: a share of all values becomes 0 or 255."""
    drawn = torch.stack([torch.rand(images_BCHW.shape[1:], generator=generator) for generator in generators])
    return images_BCHW.float().masked_fill(drawn < share / 2, 0).masked_fill(drawn > 1 - share / 2, 255)


def _gaussian_blur(images_BCHW: Tensor, sigma: float, _: Sequence[torch.Generator]) -> Tensor:
    side = min(images_BCHW.shape[2:])
    sigma *= max(1, side / 32)  # blurs the content of larger images as much; a smaller sigma would have no effect
    widest = max(1, (side - 1) // 2 * 2 - 1)  # reflection padding must be smaller than the image
    width = min(2 * round(3 * sigma) + 1, widest)
    blurred: Tensor = functional.gaussian_blur(images_BCHW.float(), [width] * 2, [sigma] * 2)
    return blurred


def _pixelate(images_BCHW: Tensor, share: float, _: Sequence[torch.Generator]) -> Tensor:
    size = list(images_BCHW.shape[2:])
    small = functional.resize(images_BCHW, [max(1, round(share * side)) for side in size], antialias=True)
    large: Tensor = functional.resize(small, size, functional.InterpolationMode.NEAREST)
    return large


def _jpeg(images_BCHW: Tensor, quality: float, _: Sequence[torch.Generator]) -> Tensor:
    def coded(image_CHW: Tensor) -> Tensor:
        file = io.BytesIO()
        Image.fromarray(image_CHW.permute(1, 2, 0).squeeze(2).numpy()).save(file, "JPEG", quality=int(quality))
        pixels = np.array(Image.open(file))
        return torch.from_numpy(pixels).view(*pixels.shape[:2], -1).permute(2, 0, 1)

    return torch.stack([coded(image) for image in images_BCHW])


def _adjust(
    function: Callable[[Tensor, float], Tensor], images_BCHW: Tensor, factor: float, _: Sequence[torch.Generator]
) -> Tensor:
    return function(images_BCHW, factor)


#: Name -> function, and its strength at severities 1 to 5.
CORRUPTIONS: Mapping[str, tuple[Corruption, tuple[float, ...]]] = MappingProxyType(
    {
        "gaussian_noise": (_gaussian_noise, (0.02, 0.04, 0.06, 0.08, 0.10)),
        "impulse_noise": (_impulse_noise, (0.005, 0.01, 0.02, 0.04, 0.08)),
        "gaussian_blur": (_gaussian_blur, (0.4, 0.6, 0.8, 1.0, 1.3)),
        "pixelate": (_pixelate, (0.75, 0.625, 0.5, 0.375, 0.25)),
        "jpeg": (_jpeg, (80, 65, 50, 35, 20)),
        "brightness": (partial(_adjust, functional.adjust_brightness), (1.1, 1.25, 1.4, 1.6, 1.8)),
        "darkness": (partial(_adjust, functional.adjust_brightness), (0.85, 0.7, 0.55, 0.4, 0.3)),
        "contrast": (partial(_adjust, functional.adjust_contrast), (0.8, 0.65, 0.5, 0.35, 0.25)),
        "saturation": (partial(_adjust, functional.adjust_saturation), (0.7, 0.4, 1.6, 2.2, 3.0)),
    }
)


def corrupt(images_BCHW: Tensor, name: str, severity: int, seed: int, numbers: Sequence[int]) -> Tensor:
    """A corrupted copy, uint8.

    Args:
        images_BCHW: uint8 pixels. The saturation of gray images and alpha channels do not change.
        name: One of `CORRUPTIONS`.
        severity: 1 to 5.
        seed: Seeds each image's generator, together with the image's index.
        numbers: The images' indices in their dataset.
    """
    if images_BCHW.shape[1] == 4:
        colors, alpha = images_BCHW[:, :3], images_BCHW[:, 3:]
        return torch.cat([corrupt(colors, name, severity, seed, numbers), alpha], dim=1)
    function, strengths = CORRUPTIONS[name]
    if name == "saturation" and images_BCHW.shape[1] != 3:
        return images_BCHW
    generators = [torch.Generator().manual_seed((seed * 1_000_003 + number) % 2**63) for number in numbers]
    corrupted = function(images_BCHW, strengths[severity - 1], generators)
    return corrupted if corrupted.dtype == torch.uint8 else corrupted.round_().clamp_(0, 255).to(torch.uint8)
