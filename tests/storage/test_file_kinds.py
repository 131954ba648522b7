import io
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save

from nernlit.storage.file_kinds import describe_file, zip_damage


def _saved(content: object, **options: object) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, **options)  # type: ignore[arg-type]
    return file.getvalue()


def _zipped(name: str, content: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(name, content)
    return file.getvalue()


def _npz() -> bytes:
    file = io.BytesIO()
    np.savez(file, a=np.ones(2))
    return file.getvalue()


def _safetensors_header(header: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header


def _tar() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("weights"))
    return file.getvalue()


def _scripted() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("net/constants.pkl", b"")
        archive.writestr("net/data.pkl", b"")
    return file.getvalue()


WEIGHTS = {"conv.weight": torch.ones(2, 3)}
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
KINDS: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "an empty file (0 bytes)"),
    "zeros": (lambda: bytes(512), "a file that begins with 512 zero bytes, as a crash during a write leaves it"),
    "lfs": (lambda: LFS, "a Git LFS pointer and not the file itself; run `git lfs pull`, or download the file"),
    "html": (
        lambda: b"\n<!DOCTYPE html><html><body>Sign in</body></html>",
        "an HTML page, as a server sends it in place of a file; download the file itself",
    ),
    "xml": (
        lambda: b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>',
        "an XML document, as a server sends it in place of a file; download the file itself",
    ),
    "json": (lambda: b'{"a": {}}', "a JSON file"),
    "index": (
        lambda: b'{"weight_map": {}}',
        "the index of weights that are split over several safetensors files; join them into one file",
    ),
    "gguf": (lambda: b"GGUF\x03\x00\x00\x00" + bytes(20), "a GGUF model, as llama.cpp reads it"),
    "tflite": (lambda: b"\x1c\x00\x00\x00TFL3" + bytes(20), "a TensorFlow Lite model"),
    "yaml": (lambda: b"trainer:\n  max_epochs: 2\n", "a text file that begins with 'trainer:'"),
    "gzip": (lambda: b"\x1f\x8b\x08\x00" + bytes(20), "a gzip archive; unpack it first"),
    "tar": (_tar, "a tar archive; unpack it first"),
    "keras": (lambda: b"\x89HDF\r\n\x1a\n" + bytes(20), "an HDF5 file, as Keras writes it"),
    "npz": (_npz, "a NumPy archive (.npz)"),
    "zip": (lambda: _zipped("a.txt", b"a"), "a zip archive of other files (a.txt); unpack it first"),
    "scripted": (_scripted, "a TorchScript program, which is not loaded because that could run code"),
    "pickle": (lambda: b"\x80\x04\x95\x00", "a Python pickle, which is not loaded because that could run code"),
    "unknown": (lambda: bytes(range(1, 256)), "a file of an unknown kind (255 bytes)"),
    "safetensors": (lambda: save(WEIGHTS), "a safetensors file (tensors: 1)"),
    "nern": (lambda: b"\x89NERN\x04", "a .nern file"),
    "old nern": (
        lambda: save(WEIGHTS, {"format": "nern", "version": "2"}),
        "a .nern file of format version 2, which only an older nernlit reads",
    ),
    "safetensors with one offset": (
        lambda: _safetensors_header(b'{"a": {"data_offsets": [0]}}'),
        "a damaged or truncated safetensors file (36 bytes)",
    ),
    "safetensors nested too deeply": (
        lambda: _safetensors_header(b'{"a":' + b"[" * 100_000),
        "a damaged or truncated safetensors file (100,013 bytes)",
    ),
    "truncated safetensors": (
        lambda: save(WEIGHTS)[:-5],
        f"a damaged or truncated safetensors file ({len(save(WEIGHTS)) - 5} bytes instead of {len(save(WEIGHTS))})",
    ),
    "weights": (lambda: _saved(WEIGHTS), "a PyTorch file of weights alone (tensors: 1)"),
    "legacy weights": (
        lambda: _saved(WEIGHTS, _use_new_zipfile_serialization=False),
        "a PyTorch file of weights alone (tensors: 1)",
    ),
    "truncated legacy weights": (
        lambda: _saved(WEIGHTS, _use_new_zipfile_serialization=False)[:-10],
        "a damaged or truncated PyTorch file",
    ),
    "nested": (lambda: _saved({"net": WEIGHTS, "acc": 3}), "a PyTorch file with the keys net, acc"),
    "tensor": (lambda: _saved(torch.ones(2)), "a PyTorch file of one tensor without a name"),
    "list": (lambda: _saved([1]), "a PyTorch file of one list"),
    "lightning": (
        lambda: _saved({"pytorch-lightning_version": "2", "global_step": 7}),
        "a Lightning checkpoint of step 7",
    ),
    "module": (
        lambda: _saved(torch.nn.Linear(1, 1)),
        "a PyTorch file of pickled objects (torch.nn.modules.linear.Linear), "
        "which are not loaded because that could run code",
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_is_told_by_its_content(kind: str) -> None:
    content, described = KINDS[kind]
    Path("file.pt").write_bytes(content())
    assert describe_file("file.pt") == described


def test_what_is_no_file_is_told_too() -> None:
    assert describe_file("nothing.pt") == "missing"
    assert describe_file(".") == "a folder"


def test_a_flipped_bit_anywhere_in_a_tensor_is_damage() -> None:
    whole = _saved(torch.arange(1000))
    Path("whole.pt").write_bytes(whole)
    assert zip_damage("whole.pt") is None
    place = whole.index(torch.arange(1000).numpy().tobytes())
    Path("flipped.pt").write_bytes(whole[: place + 50] + bytes([whole[place + 50] ^ 1]) + whole[place + 51 :])
    assert zip_damage("flipped.pt") == "the checksum of its entry 'archive/data/0' is wrong"
    assert describe_file("flipped.pt") == (
        f"a damaged or truncated zip file ({len(whole):,} bytes): the checksum of its entry 'archive/data/0' is wrong"
    )


@pytest.mark.parametrize("kept", [4, 100, 5000, -1])
def test_a_truncated_file_is_said_to_be_one(kept: int) -> None:
    whole = _saved(torch.arange(1000))
    Path("cut.pt").write_bytes(whole[:kept])
    size = Path("cut.pt").stat().st_size
    assert describe_file("cut.pt").startswith(f"a damaged or truncated zip file ({size:,} bytes): its zip directory")


def test_files_that_were_saved_without_checksums_are_whole() -> None:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(WEIGHTS, "unchecked.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert zip_damage("unchecked.pt") is None
    assert describe_file("unchecked.pt") == "a PyTorch file of weights alone (tensors: 1)"
