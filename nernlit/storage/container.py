"""The container of a .nern file: named tensors and a header of primitives, with a checksum over both.

It is a safetensors file, so that any program can look into it and no code runs when it is read. Its metadata holds the
format's name and version, the header as JSON, and the checksum.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from nernlit.errors import FileFormatError
from nernlit.storage.file_kinds import NERN, describe_file
from nernlit.storage.files import write_atomically

VERSION = 2
_AGAIN = "Copy, download or export it again."


class Contents(NamedTuple):
    """What a container holds.

    Attributes:
        header: Primitives.
        tensors: By name.
    """

    header: dict[str, Any]
    tensors: dict[str, Tensor]


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of tensors' names, shapes, types and bits, independent of their order."""
    digest = hashlib.sha256()
    for key in sorted(tensors):
        value = tensors[key].detach().cpu().contiguous()
        digest.update(f"{key} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def write_container(path: Path, contents: Contents) -> None:
    """Write a container atomically.

    Raises:
        StorageError: If it cannot be written.
    """
    write_atomically(path, container_bytes(contents))


def container_bytes(contents: Contents) -> bytes:
    """A container as the bytes of its file; the same contents give the same bytes."""
    header = json.dumps(contents.header, allow_nan=False, separators=(",", ":"))
    tensors = independent(contents.tensors)
    checksum = _checksum(header, tensors)
    metadata = {"format": "nern", "version": str(VERSION), "header": header, "sha256": checksum}
    return _in_fixed_order(save(tensors, metadata))


def _in_fixed_order(stored: bytes) -> bytes:
    """A safetensors file with sorted metadata: safetensors writes the entries in another order in every process."""
    end = 8 + int.from_bytes(stored[:8], "little")
    described = json.loads(stored[8:end])
    described["__metadata__"] = dict(sorted(described["__metadata__"].items()))
    text = json.dumps(described, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8 bytes
    return len(text).to_bytes(8, "little") + text + stored[end:]


def independent(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous copies on the CPU: safetensors refuses tensors that share memory."""
    return {name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in tensors.items()}


def read_container(path: Path) -> Contents:
    """Read a container. Time and memory are bounded by the file's size.

    Raises:
        FileFormatError: If the file is missing, is something else, is damaged, or has another version.
    """
    if not path.is_file():
        raise FileFormatError(f"{path} is {describe_file(path)}; expected a .nern file (`nernlit export` writes one).")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != "nern":
                raise FileFormatError(f"{path} is {describe_file(path)}; expected a .nern file (`nernlit export`).")
            if metadata.get("version") != str(VERSION):
                raise FileFormatError(
                    f"{path} has format version {metadata.get('version', 'unknown')[:20]}, and this nernlit reads "
                    f"version {VERSION}; use the nernlit that wrote it, or export the run again."
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        text = metadata["header"]
        intact = metadata["sha256"] == _checksum(text, tensors)
        header = json.loads(text)
    except FileFormatError:
        raise
    except Exception as error:  # safetensors raises errors of its own; JSON may be nested too deeply
        kind = describe_file(path)
        if kind == NERN:
            raise FileFormatError(f"{path} is damaged: its header is wrong. {_AGAIN}") from error
        raise FileFormatError(f"{path} is {kind}, and no .nern file that can be read.") from error
    if not intact or not isinstance(header, dict):
        raise FileFormatError(f"{path} is damaged: its checksum is wrong. {_AGAIN}")
    return Contents(header, tensors)


def _checksum(header: str, tensors: Mapping[str, Tensor]) -> str:
    return hashlib.sha256(f"{header} {fingerprint(tensors)}".encode()).hexdigest()
