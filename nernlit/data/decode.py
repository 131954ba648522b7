"""Decoding image files of any format and precision to 8-bit pixels, and resizing them to a square."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal, Self, final

import numpy as np
import timm
from numpy.typing import NDArray
from PIL import Image

from nernlit.data.channels import MODES
from nernlit.errors import DataError, UsageError

Interpolation = Literal["bilinear", "bicubic"]

#: Formats that PIL lists but that are not images which it decodes itself. EPS would start Ghostscript, which runs
#: programs; FITS stores physical quantities without a pixel range.
_NOT_DECODED = {"EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG", "FITS"}

_BITS_PER_SAMPLE, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0  # TIFF's tags


@cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(Image.OPEN.keys() - _NOT_DECODED)


@cache
def image_suffixes() -> frozenset[str]:
    """Suffixes of files that are read as images, in lower case, with their dot."""
    formats = {*_formats(), "MPO"}  # opened as JPEG
    return frozenset(suffix for suffix, kind in Image.registered_extensions().items() if kind in formats)


@final
@dataclass(frozen=True)
class ResizeCenterCrop:
    """Resizes an image of any size and crops its center to a square, as torchvision and timm do.

    Attributes:
        side: Side of the square in pixels.
        crop_share: The square's side as a share of the shorter side after resizing.
        interpolation: Interpolation of the resizing.
    """

    side: int
    crop_share: float = 1.0
    interpolation: Interpolation = "bicubic"

    @classmethod
    def from_model(cls, name: str) -> Self:
        """The image size, crop and interpolation with which a timm model is evaluated.

        Raises:
            UsageError: If timm does not know the model.
        """
        config = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
        if config is None:
            raise UsageError(
                f"timm has no model named {name!r} whose image size it knows; pass one such as resnet18.tv_in1k."
            )
        interpolation: Interpolation = "bilinear" if config.interpolation == "bilinear" else "bicubic"
        return cls(config.input_size[1], config.crop_pct, interpolation)

    def __call__(self, image: Image.Image) -> Image.Image:
        """The square."""
        shorter = int(self.side / self.crop_share)
        if image.size != (self.side, self.side) or shorter != self.side:
            longer = int(shorter * max(image.size) / min(image.size))
            size = (shorter, longer) if image.width <= image.height else (longer, shorter)
            image = image.resize(size, getattr(Image.Resampling, self.interpolation.upper()))
            left, top = (round((extent - self.side) / 2) for extent in image.size)
            image = image.crop((left, top, left + self.side, top + self.side))
        return image


def read_image(path: Path, channels: int, fitting: ResizeCenterCrop | None = None) -> NDArray[np.uint8]:
    """The pixels (H, W, channels) of an image file. Of an animation or a stack, the first image is read.

    Pixels of more than 8 bits are scaled by the range of their format. As in torchvision's `ImageFolder`, transparency
    is dropped and the rotation in EXIF data is not applied.

    Args:
        path: The file.
        channels: 1, 3 or 4.
        fitting: Resizes and crops the image to one size; None keeps the file's own size.

    Raises:
        DataError: If the file cannot be read, or its pixels have no known range. The message names the file.
    """
    try:
        if not path.is_file():
            raise OSError("not a regular file" if path.exists() else "there is no such file")
        with Image.open(path, formats=_formats()) as opened:
            image = _eight_bits(opened)
        # PIL has no direct way from these to gray.
        if image.mode in ("La", "LAB"):
            image = image.convert({"La": "LA", "LAB": "RGB"}[image.mode])
        image = image.convert(MODES[channels])
        if fitting is not None:
            image = fitting(image)
    except Exception as error:  # a damaged file can make a decoder raise any exception
        reason = next(iter(str(error).splitlines()), "").replace(repr(str(path)), "").strip()
        raise DataError(
            f"{path} is not a readable image ({type(error).__name__}: {reason}); replace or remove the file."
        ) from error
    pixels = np.array(image)
    return pixels.reshape(*pixels.shape[:2], channels)


def _eight_bits(image: Image.Image) -> Image.Image:
    """The image in a mode of 8 bits per channel. Larger values are scaled by their range; PIL's `convert` clips them.

    Raises:
        ValueError: If the range is not known, or values lie outside of it.
    """
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        image.load()
        return image
    tags = getattr(image, "tag_v2", {})
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        raise ValueError(f"white is stored as zero with {image.mode!r} pixels; save it with black as zero")
    values = np.asarray(image).astype(np.float64)
    if image.mode == "F":
        largest = 1.0
    elif image.mode.startswith("I;16"):
        largest = 2.0 ** tags.get(_BITS_PER_SAMPLE, (16,))[0] - 1
    elif image.format in ("PNG", "PPM"):
        largest = 2.0**16 - 1  # what PIL scales them to
    else:
        raise ValueError("integers of 32 bits have no known range; save it with 8 or 16 bits")
    if not ((values >= 0) & (values <= largest)).all():  # also where a value is not a number
        raise ValueError(
            f"pixels from {values.min():g} to {values.max():g}, expected {image.mode!r} pixels from 0 to {largest:g}; "
            "save it with 8 or 16 bits"
        )
    return Image.fromarray(np.round(values * (255 / largest)).astype(np.uint8))
