"""The kind of a file, determined from its content, for error messages."""

import json
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint

from nernlit.utilities.text import abbreviated

_LEGACY_TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_HEAD = 4096
#: The first bytes of a .nern file; the next one is its format version.
MAGIC = b"\x89NERN"
#: First bytes of a file -> what it is.
_SIGNATURES = {
    MAGIC: "a .nern file",
    b"\x1f\x8b": "a gzip archive; unpack it first",
    b"BZh": "a bzip2 archive; unpack it first",
    b"\xfd7zXZ\x00": "an xz archive; unpack it first",
    b"\x28\xb5\x2f\xfd": "a zstd archive; unpack it first",
    b"7z\xbc\xaf\x27\x1c": "a 7-Zip archive; unpack it first",
    b"Rar!": "a RAR archive; unpack it first",
    b"\x89HDF\r\n\x1a\n": "an HDF5 file, as Keras writes it",
    b"\x93NUMPY": "a NumPy array (.npy)",
    b"GGUF": "a GGUF model, as llama.cpp reads it",
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"%PDF": "a PDF document",
    b"\x7fELF": "a program (ELF)",
}


def describe_file(path: str | Path) -> str:
    """Describe a file, for a sentence that starts with its name: `f"{path} is {describe_file(path)}"`.

    Nothing is unpickled but tensors and plain containers. Never raises for a file's content.
    """
    path = Path(path)
    if path.is_dir():
        return "a folder"
    if not path.exists():
        return "missing"
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(_HEAD)
    except OSError as error:
        return f"unreadable ({error.strerror})"
    if not head:
        return "an empty file (0 bytes)"
    if head.startswith(b"PK"):
        return _zip(path, size)
    if head.startswith(_LEGACY_TORCH):
        return _torch(path)
    for signature, kind in _SIGNATURES.items():
        if head.startswith(signature):
            return kind
    if head[4:8] == b"TFL3":
        return "a TensorFlow Lite model"
    if head[257:262] == b"ustar":
        return "a tar archive; unpack it first"
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return "a Python pickle, which is not loaded because that could run code"
    if not head.strip(b"\0"):
        return f"a file that begins with {len(head)} zero bytes, as a crash during a write leaves it"
    header = int.from_bytes(head[:8], "little")
    if head[8:9] == b"{" and header < 100_000_000:
        return _safetensors(path, size, header)
    if head[:1] == b"\x08" and b"pytorch" in head[:64]:
        return "an ONNX model"
    return _text(head, size) or f"a file of an unknown kind ({size:,} bytes)"


def zip_damage(path: str | Path) -> str | None:
    """What is wrong with a zip file (as `torch.save` writes it), by the checksums of all its entries; None if whole."""
    try:
        with zipfile.ZipFile(path) as archive:
            # torch.serialization.set_crc32_options(False) leaves all of them out.
            broken = archive.testzip() if any(entry.CRC for entry in archive.infolist()) else None
    except OSError as error:
        return f"it cannot be read ({error.strerror})"
    except Exception:  # a damaged directory makes zipfile raise nearly anything
        return "its zip directory is missing or broken, as after an interrupted write or download"
    return None if broken is None else f"the checksum of its entry {broken!r} is wrong"


def _zip(path: Path, size: int) -> str:
    damage = zip_damage(path)
    if damage is not None:
        return f"a damaged or truncated zip file ({size:,} bytes): {damage}"
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    files = {name.partition("/")[2] for name in names}
    if "constants.pkl" in files:
        return "a TorchScript program, which is not loaded because that could run code"
    if "data.pkl" in files:
        return _torch(path)
    if names and all(name.endswith(".npy") for name in names):
        return "a NumPy archive (.npz)"
    return f"a zip archive of other files ({abbreviated(names, 2)}); unpack it first"


def _torch(path: Path) -> str:
    try:
        with path.open("rb") as file:  # by its name, torch takes a `.safetensors` for what it may not be
            content: Any = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        objects = _pickled_objects(path)
        return f"a PyTorch file of pickled objects{objects}, which are not loaded because that could run code"
    except Exception:  # torch raises nearly anything for damaged files
        return "a damaged or truncated PyTorch file"
    if isinstance(content, Tensor):
        return "a PyTorch file of one tensor without a name"
    if not isinstance(content, Mapping):
        return f"a PyTorch file of one {type(content).__name__}"
    if "pytorch-lightning_version" in content:
        return f"a Lightning checkpoint of step {content.get('global_step', '?')}"
    tensors = sum(isinstance(value, Tensor) for value in content.values())
    if tensors:
        return f"a PyTorch file of weights alone (tensors: {tensors})"
    keys = abbreviated([str(key) for key in content])
    return f"a PyTorch file with the keys {keys}" if content else "a PyTorch file with nothing in it"


def _pickled_objects(path: Path) -> str:
    try:
        with path.open("rb") as file:
            names = sorted(set(get_unsafe_globals_in_checkpoint(file)))
    except Exception:  # older files cannot be looked into
        return ""
    return f" ({abbreviated(names, 3)})" if names else ""


def _safetensors(path: Path, size: int, header: int) -> str:
    try:
        with path.open("rb") as file:
            file.seek(8)
            entries = json.loads(file.read(header))
        ends = [int(entry["data_offsets"][1]) for name, entry in entries.items() if name != "__metadata__"]
        end = max(ends, default=0)
        metadata = entries.get("__metadata__", {})
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError):
        return f"a damaged or truncated safetensors file ({size:,} bytes)"
    if size != 8 + header + end:
        return f"a damaged or truncated safetensors file ({size:,} bytes instead of {8 + header + end:,})"
    if isinstance(metadata, dict) and metadata.get("format") == "nern":
        return f"a .nern file of format version {str(metadata.get('version'))[:20]}, which only an older nernlit reads"
    return f"a safetensors file (tensors: {len(entries.keys() - {'__metadata__'})})"


def _text(head: bytes, size: int) -> str | None:
    try:
        text = head.decode() if size <= _HEAD else head[:-4].decode(errors="ignore")
    except UnicodeDecodeError:
        return None
    start = text.lstrip("\ufeff \t\r\n")
    if "\0" in text or any(ord(character) < 9 for character in text):
        return None
    if start.startswith("version https://git-lfs"):
        return "a Git LFS pointer and not the file itself; run `git lfs pull`, or download the file"
    if start[:14].lower() == "<!doctype html" or "<html" in start[:500].lower():
        return "an HTML page, as a server sends it in place of a file; download the file itself"
    if start.startswith(("<?xml", "<Error>")):
        return "an XML document, as a server sends it in place of a file; download the file itself"
    if start[:1] in ("{", "["):
        if '"weight_map"' in start:
            return "the index of weights that are split over several safetensors files; join them into one file"
        return "a JSON file"
    line = start.splitlines()[0][:40] if start else ""
    return f"a text file that begins with {line!r}"
