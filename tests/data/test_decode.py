"""Image files of every mode, precision and kind of damage."""

import os
import struct
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from nernlit.data import FolderDataModule
from nernlit.data.decode import ResizeCenterCrop, image_suffixes, read_image
from nernlit.errors import DataError
from nernlit.utilities.progress import progress
from tests.fakes import write_image_folder

RAMP = np.linspace(0, 1, 256).reshape(16, 16)
GRAY = np.round(255 * RAMP).astype(np.uint8)
COLORS = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)


def _refused(path: Path, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        read_image(path, 3)
    assert str(caught.value).startswith(f"{path} is not a readable image (")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize(
    ("name", "pixels"),
    [
        ("16.png", np.round(65535 * RAMP).astype(np.uint16)),
        ("16.tif", np.round(65535 * RAMP).astype(np.uint16)),
        ("16.jp2", np.round(65535 * RAMP).astype(np.uint16)),
        ("float.tif", RAMP.astype(np.float32)),
        ("8.png", GRAY),
        ("8.gif", GRAY),
        ("8.pgm", GRAY),
    ],
)
def test_every_precision_is_scaled_by_its_own_range(
    name: str, pixels: np.ndarray, channels: int, tmp_path: Path
) -> None:
    Image.fromarray(pixels).save(tmp_path / name)
    read = read_image(tmp_path / name, channels)
    assert read.shape == (16, 16, channels)
    assert read.dtype == np.uint8
    assert np.array_equal(read[:, :, 0], GRAY)
    assert (read[:, :, 1:3] == read[:, :, :1]).all()
    assert (read[:, :, 3:] == 255).all()


def test_gray_maps_of_any_largest_value_are_scaled(tmp_path: Path) -> None:
    for largest, depth in ((1000, ">u2"), (65535, ">u2"), (100, "u1")):
        pixels = np.round(largest * RAMP).astype(depth)
        (tmp_path / "x.pgm").write_bytes(f"P5 16 16 {largest}\n".encode() + pixels.tobytes())
        assert np.abs(read_image(tmp_path / "x.pgm", 1)[:, :, 0] - 255.0 * RAMP).max() <= 0.5 + 255 / largest / 2
    (tmp_path / "x.pfm").write_bytes(b"Pf\n16 16\n-1.0\n" + RAMP[::-1].astype("<f4").tobytes())
    assert np.array_equal(read_image(tmp_path / "x.pfm", 1)[:, :, 0], GRAY)


def _tiff(path: Path, pixels: bytes, bits: int, photometric: int, kind: int) -> None:
    """A TIFF of 16x16 pixels in one strip."""
    tags = [
        *((256, 3, 16), (257, 3, 16), (258, 3, bits), (259, 3, 1), (262, 3, photometric)),
        *((273, 4, 8), (277, 3, 1), (278, 3, 16), (279, 4, len(pixels)), (339, 3, kind)),
    ]
    entries = b"".join(struct.pack("<HHII", tag, size, 1, value) for tag, size, value in tags)
    directory = struct.pack("<H", len(tags)) + entries + struct.pack("<I", 0)
    path.write_bytes(b"II*\0" + struct.pack("<I", 8 + len(pixels)) + pixels + directory)


def test_twelve_bits_are_scaled_by_twelve_bits(tmp_path: Path) -> None:
    values = np.round(4095 * RAMP).astype(int).ravel()
    first, second = values[::2], values[1::2]
    packed = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], axis=1).astype(np.uint8)
    _tiff(tmp_path / "12.tif", packed.tobytes(), bits=12, photometric=1, kind=1)
    assert np.array_equal(read_image(tmp_path / "12.tif", 1)[:, :, 0], GRAY)


def test_pixels_without_a_known_range_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "x.tif"
    Image.fromarray(np.arange(256, dtype=np.int32).reshape(16, 16)).save(file)
    _refused(file, "integers of 32 bits have no known range; save it with 8 or 16 bits")
    _tiff(file, np.arange(-128, 128, dtype="<i2").tobytes(), bits=16, photometric=1, kind=2)
    _refused(file, "integers of 32 bits have no known range")
    _tiff(file, np.arange(256, dtype="<u2").tobytes(), bits=16, photometric=0, kind=1)
    _refused(file, "white is stored as zero with 'I;16' pixels")
    for values in ([-0.01, 1], [0, 255], [0, np.nan], [0, np.inf]):
        Image.fromarray(np.resize(np.float32(values), (16, 16))).save(file)
        _refused(file, r"pixels from .+ to .+, expected 'F' pixels from 0 to 1; save it with 8 or 16 bits")


#: Modes that PIL reaches from gray by way of another.
THROUGH = {"La": "LA", "RGBa": "RGBA", "HSV": "RGB", "CMYK": "RGB", "YCbCr": "RGB"}


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", *THROUGH])
def test_every_mode_of_eight_bits_becomes_gray_or_colors(
    mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stripes = np.resize(np.array([0, 255], np.uint8), (8, 16))
    image = Image.fromarray(stripes).convert(THROUGH.get(mode, mode)).convert(mode)
    (tmp_path / "x.png").touch()
    monkeypatch.setattr(Image, "open", lambda path, formats: image)
    for channels in (1, 3, 4):
        read = read_image(tmp_path / "x.png", channels)
        assert read.shape == (8, 16, channels)
        assert np.array_equal(read[:, :, :3], np.broadcast_to(stripes[:, :, None], (8, 16, min(channels, 3))))


def test_lab_is_converted_to_the_screens_colors(tmp_path: Path) -> None:
    Image.new("LAB", (4, 4), (255, 128, 128)).save(tmp_path / "white.tif")
    assert read_image(tmp_path / "white.tif", 3).min() >= 254
    assert read_image(tmp_path / "white.tif", 1).min() >= 254


def test_transparency_is_dropped_or_kept_as_alpha(tmp_path: Path) -> None:
    alpha = np.linspace(0, 255, 256).astype(np.uint8).reshape(16, 16, 1)
    Image.fromarray(np.concatenate([COLORS, alpha], axis=2)).save(tmp_path / "x.png")
    assert np.array_equal(read_image(tmp_path / "x.png", 3), COLORS)
    assert np.array_equal(read_image(tmp_path / "x.png", 4)[:, :, 3:], alpha)
    gray = Image.fromarray(COLORS).convert("L")
    assert np.array_equal(read_image(tmp_path / "x.png", 1)[:, :, 0], np.asarray(gray))


@pytest.mark.parametrize("name", ["x.gif", "x.png", "x.tif", "x.webp"])
def test_of_several_images_in_a_file_the_first_is_read(name: str, tmp_path: Path) -> None:
    first, second = (Image.new("L", (8, 8), level) for level in (40, 200))
    options = {"lossless": True} if name == "x.webp" else {}
    first.save(tmp_path / name, save_all=True, append_images=[second], **options)
    assert (read_image(tmp_path / name, 3) == 40).all()


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def _with_chunk(path: Path, chunk: bytes) -> None:
    """A PNG with a chunk before its last one."""
    Image.fromarray(COLORS).save(path)
    content = path.read_bytes()
    path.write_bytes(content[:-12] + chunk + content[-12:])


def _long_text(path: Path) -> None:
    text = PngImagePlugin.PngInfo()
    text.add_text("a", "x" * (PngImagePlugin.MAX_TEXT_CHUNK + 1), zip=True)
    Image.fromarray(COLORS).save(path, pnginfo=text)


def _bomb(path: Path) -> None:
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + _chunk(b"IDAT", zlib.compress(b"\0")) + _chunk(b"IEND", b""))


def _truncated(path: Path) -> None:
    Image.fromarray(COLORS).save(path)
    path.write_bytes(path.read_bytes()[:-200])


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: _with_chunk(path, _chunk(b"iCCP", b"")), "IndexError: "),
        (lambda path: _with_chunk(path, _chunk(b"gAMA", b"")), "(ValueError|error): "),  # by Pillow's version
        (_long_text, "ValueError: "),
        (_bomb, "DecompressionBombError: .*400000000 pixels"),
        (_truncated, "OSError: image file is truncated"),
        (lambda path: path.write_bytes(b""), "UnidentifiedImageError: cannot identify image file"),
        (lambda path: path.write_text("<html>"), "UnidentifiedImageError: cannot identify image file"),
        (lambda path: path.symlink_to("nowhere"), "OSError: there is no such file"),
        (lambda path: path.mkdir(), "OSError: not a regular file"),
        (os.mkfifo, "OSError: not a regular file"),
    ],
    ids=["empty profile", "empty gamma", "text", "bomb", "truncated", "empty", "html", "link", "folder", "pipe"],
)
def test_damaged_files_are_named_in_one_line(write: object, message: str, tmp_path: Path) -> None:
    write(tmp_path / "x.png")  # type: ignore[operator]
    _refused(tmp_path / "x.png", message)


def test_a_file_is_no_program(tmp_path: Path) -> None:
    # PIL hands PostScript to Ghostscript, whatever the file's suffix says.
    (tmp_path / "x.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n")
    _refused(tmp_path / "x.png", "UnidentifiedImageError")
    assert not image_suffixes() & {".eps", ".ps", ".wmf", ".mpg", ".h5", ".pdf", ".txt", ".npy"}
    assert image_suffixes() >= {
        ".jpg",
        ".jpeg",
        ".jfif",
        ".png",
        ".bmp",
        ".gif",
        ".pgm",
        ".ppm",
        ".tif",
        ".webp",
        ".mpo",
    }


def test_an_image_of_extreme_proportions_is_fitted_or_refused(tmp_path: Path) -> None:
    Image.new("L", (2, 600)).save(tmp_path / "x.png")
    assert read_image(tmp_path / "x.png", 3, ResizeCenterCrop(8)).shape == (8, 8, 3)


def test_reading_a_tree_shows_how_far_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in ("sources", "trees"):
        monkeypatch.setattr(f"nernlit.data.{module}.progress", partial(progress, delay=0))
    data = FolderDataModule(str(write_image_folder(tmp_path, 2, 3)))
    data.setup("test")
    assert capsys.readouterr().err.splitlines() == [
        f"listing the images of {tmp_path}/test ...",
        "decoding 6 images ...",
    ]
