"""The container of a .nern file: named tensors and a header of primitives, with a checksum over both.

Reading a container never runs code. Layout of the file in bytes (integers are little-endian):

- 6: the magic number, whose last byte is the version;
- 8: the first bytes of the SHA-256 of all that follows;
- 4: the length of the compressed header;
- the header as JSON, compressed as a raw LZMA stream (`_LZMA`); its entry `tensors` lists name -> [type, shape];
- the numbers of the tensors, in the order of the list.
"""

import hashlib
import json
import lzma
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nernlit.errors import FileFormatError, UsageError
from nernlit.storage.file_kinds import MAGIC, describe_file
from nernlit.storage.files import write_atomically

VERSION = 4
_AGAIN = "Copy, download or export it again."
#: Most bytes of a header's JSON: what is read from a file is decompressed no further.
_LARGEST_HEADER = 2**24
_LZMA = [{"id": lzma.FILTER_LZMA1, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 2**20, "lc": 4, "lp": 0, "pb": 0}]
_CHECKSUM = 8
_LENGTH = 4
_TYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
        *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128),
    )
}


class Contents(NamedTuple):
    """What a container holds.

    Attributes:
        header: JSON-compatible values.
        tensors: Name -> tensor.
    """

    header: dict[str, Any]
    tensors: dict[str, Tensor]


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of tensors' names, shapes, types and bits, independent of their order."""
    digest = hashlib.sha256()
    for key in sorted(tensors):
        value = tensors[key].detach().cpu()
        digest.update(f"{key} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(_numbers(value))
    return digest.hexdigest()


def write_container(path: Path, contents: Contents) -> None:
    """Write a container atomically.

    Raises:
        StorageError: If it cannot be written.
        UsageError: If it cannot be read again; see `container_bytes`.
    """
    write_atomically(path, container_bytes(contents))


def container_bytes(contents: Contents) -> bytes:
    """A container as the bytes of its file; the same contents give the same bytes.

    Raises:
        UsageError: If the header is too long, or a tensor has a type that cannot be stored.
    """
    listed, stored = {}, []
    for name, value in contents.tensors.items():
        kind = str(value.dtype).removeprefix("torch.")
        if kind not in _TYPES:
            raise UsageError(f"{name} is {kind}; a .nern file stores {', '.join(_TYPES)}.")
        listed[name] = [kind, list(value.shape)]
        stored.append(_numbers(value))
    text = json.dumps({**contents.header, "tensors": listed}, allow_nan=False, separators=(",", ":")).encode()
    if len(text) > _LARGEST_HEADER:
        raise UsageError(
            f"the description of the network has {len(text):,} bytes; expected {_LARGEST_HEADER:,} at most."
        )
    header = lzma.compress(text, lzma.FORMAT_RAW, filters=_LZMA)
    rest = b"".join([len(header).to_bytes(_LENGTH, "little"), header, *stored])
    return MAGIC + bytes([VERSION]) + hashlib.sha256(rest).digest()[:_CHECKSUM] + rest


def read_container(path: Path) -> Contents:
    """Read a container. Time and memory are bounded by the file's size and 16 MiB for its header.

    Raises:
        FileFormatError: If the file is missing, is something else, is damaged, or has another version.
    """
    if not path.is_file():
        raise FileFormatError(f"{path} is {describe_file(path)}; expected a .nern file (`nernlit export` writes one).")
    content = path.read_bytes()
    start = len(MAGIC) + 1 + _CHECKSUM
    if not content.startswith(MAGIC):
        expected = f"a .nern file of version {VERSION} (`nernlit export` writes one)"
        raise FileFormatError(f"{path} is {describe_file(path)}; expected {expected}.")
    if content[len(MAGIC) : len(MAGIC) + 1] not in (bytes([VERSION]), b""):
        raise FileFormatError(
            f"{path} has format version {content[len(MAGIC)]}, and this nernlit reads version {VERSION}; use the "
            "nernlit that wrote it, or export the run again."
        )
    if content[start - _CHECKSUM : start] != hashlib.sha256(content[start:]).digest()[:_CHECKSUM]:
        raise FileFormatError(f"{path} is damaged: its checksum is wrong. {_AGAIN}")
    try:
        return _contents(content, start)
    # The checksum is right, so the header was forged; any error is possible, such as RecursionError.
    except Exception as error:
        raise FileFormatError(f"{path} is damaged: its header is wrong. {_AGAIN}") from error


def _contents(content: bytes, start: int) -> Contents:
    """The contents of a file from the length of the header on; any error says that it is not a container."""
    end = start + _LENGTH + int.from_bytes(content[start : start + _LENGTH], "little")
    decompressor = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=_LZMA)
    text = decompressor.decompress(content[start + _LENGTH : end], max_length=_LARGEST_HEADER + 1)
    if len(text) > _LARGEST_HEADER:
        raise ValueError("the header is too long")
    header = json.loads(text)
    tensors = {}
    for name, (kind, shape) in header.pop("tensors").items():
        dtype, count = _TYPES[kind], math.prod(shape)
        size = count * dtype.itemsize
        if any(type(length) is not int or length < 0 for length in shape) or size > len(content) - end:
            raise ValueError("a tensor is not in the file")
        numbers = (
            torch.frombuffer(bytearray(content[end : end + size]), dtype=dtype) if size else torch.empty(0, dtype=dtype)
        )
        tensors[name] = numbers.reshape(shape)
        end += size
    if end != len(content):
        raise ValueError("there are more bytes than tensors")
    return Contents(header, tensors)


def _numbers(value: Tensor) -> bytes:
    # A view of one number is contiguous with any stride, and only stride 1 can be viewed as bytes.
    flat = value.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1).as_strided((value.numel(),), (1,))
    return flat.view(torch.uint8).numpy().tobytes()
