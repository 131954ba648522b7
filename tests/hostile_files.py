"""Good and bad files of every kind, for the table in `tests.hostile`."""

import io
import json
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from nernlit.originals import Original
from nernlit.storage.container import Contents, read_container, write_container
from tests.fakes import digits_representation

#: What writes a file: its content, or a function of its path.
Writer = bytes | str | Callable[[Path], object]


def write_good_files(folder: Path) -> None:
    """A .nern file, a checkpoint, weights, a tree of images, CIFAR-10-C of it, and the folder of a Progressive fit."""
    representation = digits_representation()
    representation.save(folder / "good.nern")
    state = {f"representation.{name}": value for name, value in representation.state_dict().items()}
    described = {
        "original": {"name": "digits_resnet8", "pretrained": True},
        "predictor": {"class_path": "nernlit.MLP", "init_args": {"hidden": 8, "num_frequencies": 4}},
    }
    checkpoint = {"state_dict": state, "hyper_parameters": {"representation": described}}
    torch.save(checkpoint, folder / "good.ckpt")
    save_file(representation.original.net.state_dict(), folder / "good.safetensors")
    (folder / "run/checkpoints").mkdir(parents=True)
    (folder / "run/rounds").mkdir()
    torch.save(checkpoint, folder / "run/checkpoints/best.ckpt")
    (folder / "run/config.yaml").write_text("data: {class_path: DigitsDataModule}\n")
    (folder / "run/rounds/rounds.json").write_text('[{"round": 1, "recon_rmse": 0.1}]')
    save_file(representation.reconstructed(), folder / "run/rounds/round-01.safetensors")
    for split in ("train", "test"):
        for label in range(10):
            (folder / f"images/{split}/{label}").mkdir(parents=True)
            Image.new("L", (8, 8), 20 * label).save(folder / f"images/{split}/{label}/0.png")
    (folder / "c").mkdir()
    np.save(folder / "c/fog.npy", np.zeros((50, 32, 32, 3), dtype=np.uint8))
    np.save(folder / "c/labels.npy", np.tile(np.arange(10), 5))


def saved_in_itself() -> bytes:
    """A checkpoint whose weights contain themselves."""
    file, state = io.BytesIO(), dict[str, Any]()
    state["representation.x"] = state
    torch.save({"state_dict": state}, file)
    return file.getvalue()


def array(content: object, **options: Any) -> bytes:
    """As `numpy.save` writes it."""
    file = io.BytesIO()
    np.save(file, content, **options)  # type: ignore[arg-type]
    return file.getvalue()


def forged(**changes: Any) -> Callable[[Path], None]:
    """The good .nern file with another header or other tensors, and a right checksum: what a forger would write."""

    def write(path: Path) -> None:
        header, tensors = read_container(path.with_name("good.nern"))
        for name, change in changes.items():
            if isinstance(change, Tensor):
                tensors[name] = change
            elif name in header["specification"]:
                header["specification"][name] = change
            else:
                header[name] = change
        write_container(path, Contents(header, tensors))

    return write


def refitted(**changes: Any) -> Callable[[Path], None]:
    """The good checkpoint with another entry, or (with dots for __) another part of one."""

    def write(path: Path) -> None:
        content = torch.load(path.with_name("good.ckpt"), weights_only=True)
        for name, change in changes.items():
            *above, last = name.split("__")
            part = content
            for key in above:
                part = part[key]
            part[last] = change
        torch.save(content, path)

    return write


def reweighted(**changes: Any) -> Callable[[Path], None]:
    """The good weights with others of these names (with dots for __)."""

    def write(path: Path) -> None:
        state = Original("digits_resnet8", pretrained=True).net.state_dict()
        state |= {name.replace("__", "."): change for name, change in changes.items()}
        torch.save({name: value for name, value in state.items() if value is not None}, path)

    return write


def chunk(kind: bytes, content: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


class Code:
    """What runs code when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("ran"),)


SWEEP_HEAD = (
    "config,seed,select,settings,asked_hidden,files,folder,host,hidden,cr_paper,cr_file,acc_original,acc,recon_rmse,"
    "explained_power,difference,difference_low,difference_high,p_value,fit_seconds,steps_per_second,peak_memory_mib\n"
)
RESULT = "digits_h96_seed0/version_1/test.json"
COMPARE_HEAD = (
    "method,setting,original,data,options,file,bytes,original_bytes,acc_original,acc,difference,difference_low,"
    "difference_high,p_value,fit_seconds\n"
)


def swept(**cells: str) -> dict[str, Writer]:
    """The table of a sweep of one fit."""
    names = SWEEP_HEAD.strip().split(",")
    return {"sweep.csv": SWEEP_HEAD + ",".join({**dict.fromkeys(names, "1"), **cells}[name] for name in names) + "\n"}


def tested(**cells: object) -> dict[str, Writer]:
    """The result of a fit of a sweep."""
    names = [name for name in SWEEP_HEAD.strip().split(",") if name != "folder"]
    return {RESULT: json.dumps({**dict.fromkeys(names, "1"), **cells})}


def compared(**cells: str) -> dict[str, Writer]:
    """The table of a comparison of one file."""
    names = COMPARE_HEAD.strip().split(",")
    good = {
        **dict.fromkeys(names, "1"),
        "method": "fp16",
        "file": "fp16.safetensors",
        "data": "--data=DigitsDataModule",
    }
    good |= {"original": Original("digits_resnet8", pretrained=True).fingerprint()[:12], "options": ""}
    return {"compare.csv": COMPARE_HEAD + ",".join({**good, **cells}[name] for name in names) + "\n"}


def bomb() -> bytes:
    """A PNG of 400 million pixels in a few bytes."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def png(extra: bytes = b"", cut: int = 0) -> bytes:
    """An image with a chunk before its last one, or without its last bytes."""
    file = io.BytesIO()
    Image.effect_noise((32, 32), 80).save(file, "PNG")
    content = file.getvalue()
    content = content[:-12] + extra + content[-12:]
    return content[: len(content) - cut]


def aliases() -> str:
    """A list of ten lists of ten lists of ..."""
    lines = [
        f"{name}: &{name} [{', '.join(['*' + above] * 10)}]" for above, name in zip("abcdefg", "bcdefgh", strict=True)
    ]
    return "\n".join(["a: &a [x, x, x, x, x, x, x, x, x, x]", *lines])


def changed_bytes(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """The good .nern file with other bytes."""
    return lambda path: path.write_bytes(change(path.with_name("good.nern").read_bytes())) and None


def with_header(text: bytes, rest: bytes = b"") -> bytes:
    """A safetensors file with this header."""
    return len(text).to_bytes(8, "little") + text + rest


def _in_place_of(path: Path, write: Callable[[Path], object]) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    write(path)


def replaced(write: Callable[[Path], object]) -> Callable[[Path], None]:
    """What replaces a good file or folder by something else."""
    return lambda path: _in_place_of(path, write)


def two_networks(path: Path) -> None:
    """Two sets of weights that fit."""
    state = Original("digits_resnet8", pretrained=True).net.state_dict()
    torch.save({"student": state, "teacher": {name: 2 * value for name, value in state.items()}}, path)
