"""`nernlit doctor`: versions, devices, speed and caches of this installation, what is wrong with it and how to fix it.

Exit code 1 if something is wrong.
"""

# Libraries are imported where they are needed, and not at the top: a broken one is to be reported.

import importlib
import importlib.metadata
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import final

import psutil
from packaging.requirements import Requirement
from platformdirs import user_cache_path
from rich.console import Console

from nernlit import __version__
from nernlit.cli.arguments import CommandParser
from nernlit.utilities.tables import print_table

#: Side of the square matrices whose product is timed, and the shortest time, in seconds.
_SIDE, _SECONDS = 1024, 0.3
_LEAST_FREE_GIB = 2.0
_GIB = 2**30


def main(args: Sequence[str]) -> None:
    """Print a report on this installation; the exit code is 1 if something is wrong."""
    CommandParser("doctor", __doc__).parse_args(args)
    examination = _Examination()
    print_table("versions", ["package", "installed", "supported"], list(examination.versions()), names=3)
    print_table("machine", ["what", "found"], list(examination.machine()), names=2)
    print_table("caches", ["cache", "size", "folder"], list(examination.caches()), names=3)
    for note in examination.notes:
        _say(f"note: {note}")
    for problem in examination.problems:
        _say(f"problem: {problem}")
    if examination.problems:
        raise SystemExit(1)
    _say("no problems found")


#: Extra -> what needs it.
_EXTRAS = {"onnx": "exports to .onnx need", "optuna": "`nernlit search` needs"}


@final
class _Examination:
    """What is found.

    Attributes:
        problems: What does not work, and how to fix it.
        notes: What is missing for some commands only.
    """

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.notes: list[str] = []

    def versions(self) -> Iterator[list[str]]:
        """Package, installed and supported version; those of extras only where they are installed."""
        yield ["nernlit", __version__, ""]
        for need in _needs("nernlit"):
            extra = str(need.marker).rpartition("extra == ")[2].strip("\"'") if need.marker else ""
            installed = _installed(need.name)
            if installed is not None and need.specifier.contains(installed, prereleases=True):
                if not extra:
                    yield [need.name, installed, str(need.specifier)]
                continue
            wanted = f"{need.name}{need.specifier}"
            if extra in _EXTRAS:
                self.notes.append(f"{wanted} is missing, which {_EXTRAS[extra]}: pip install 'nernlit[{extra}]'")
            elif not extra:
                yield [need.name, installed or "missing", str(need.specifier)]
                found = "missing" if installed is None else f"{installed}, which is not supported"
                self.problems.append(f"{need.name} is {found}: pip install '{wanted}'")
        if not _needs("nernlit"):
            self.problems.append("nernlit is importable but not installed: run `pip install .` in its folder")
        if _installed("lightning-sdk"):
            self.notes.append("`lightning` is the program of lightning-sdk; use `nernlit`")

    def machine(self) -> Iterator[list[str]]:
        """Python, processors, memory, disk, and what torch sees and how fast it is."""
        yield ["Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"]
        memory, free = psutil.virtual_memory(), shutil.disk_usage(Path.cwd()).free / _GIB
        yield ["processor", f"{os.cpu_count()} cores, load {psutil.getloadavg()[0]:.1f}"]
        yield ["memory", f"{memory.available / _GIB:.1f} of {memory.total / _GIB:.1f} GiB are free"]
        yield ["disk", f"{free:.1f} GiB are free in this folder"]
        if free < _LEAST_FREE_GIB:
            self.problems.append(f"{free:.1f} GiB are free in {Path.cwd()}: free space, or run in another folder")
        if not os.access(Path.cwd(), os.W_OK):
            self.problems.append(f"{Path.cwd()} is read-only, and runs are written to it: run in another folder")
        torch = self._imported("torch")
        if torch is None:
            return
        self._imported("torchvision")  # fails if it was built for another torch
        yield ["threads", f"{torch.get_num_threads()} of torch"]
        yield ["cpu", f"{_gigaflops(torch, 'cpu'):,.0f} GFLOP/s (float32 products of {_SIDE} x {_SIDE})"]
        for number in range(torch.cuda.device_count()):
            name, size = torch.cuda.get_device_name(number), torch.cuda.get_device_properties(number).total_memory
            yield [
                f"cuda:{number}",
                f"{name}, {size / _GIB:.0f} GiB, {_gigaflops(torch, f'cuda:{number}'):,.0f} GFLOP/s",
            ]
        if torch.backends.mps.is_available():
            yield ["mps", f"{_gigaflops(torch, 'mps'):,.0f} GFLOP/s"]
        if shutil.which("nvidia-smi") and not torch.cuda.is_available():
            self.problems.append(
                "torch sees no GPU, but there is nvidia-smi: install torch for its CUDA version (https://pytorch.org)"
            )

    def caches(self) -> Iterator[list[str]]:
        """Name, size and folder; a folder that cannot be written is a problem."""
        package = Path(sys.modules["nernlit"].__path__[0])
        compiled = Path(os.environ.get("NUMBA_CACHE_DIR", package))
        yield [
            "compiled code",
            _size(compiled, "*.nb[ci]"),
            str(compiled),
        ]  # where it is read-only, numba takes another
        caches = [("orders", user_cache_path("nernlit") / "orders", "XDG_CACHE_HOME")]
        if (hub := self._imported("huggingface_hub.constants")) is not None:
            caches.append(("timm's weights", Path(hub.HF_HUB_CACHE), "HF_HOME"))
        for name, folder, variable in caches:
            yield [name, _size(folder, "*"), str(folder)]
            existing = next(path for path in (folder, *folder.parents) if path.exists())
            if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
                self.problems.append(
                    f"{folder} is not writable, so each command recreates its content: set {variable} to another folder"
                )

    def _imported(self, name: str) -> ModuleType | None:
        try:
            return importlib.import_module(name)
        except Exception as error:  # a broken installation raises nearly anything
            reason = " ".join(str(error).split())[:200]
            self.problems.append(f"{name} cannot be imported ({type(error).__name__}: {reason}): install it again")
            return None


def _needs(package: str) -> list[Requirement]:
    try:
        return [Requirement(need) for need in importlib.metadata.requires(package) or []]
    except importlib.metadata.PackageNotFoundError:
        return []


def _installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gigaflops(torch: ModuleType, device: str) -> float:
    """The rate of products of square matrices."""
    matrix = torch.ones(_SIDE, _SIDE, device=device)
    (matrix @ matrix).sum().item()  # the first one starts threads, or loads kernels
    began, products = time.perf_counter(), 0
    while time.perf_counter() - began < _SECONDS:
        (matrix @ matrix).sum().item()  # waits for the device
        products += 1
    return float(2 * _SIDE**3 * products / (time.perf_counter() - began) / 1e9)


def _size(folder: Path, pattern: str) -> str:
    sizes = [path.lstat().st_size for path in folder.rglob(pattern) if not path.is_dir()]
    return f"{sum(sizes) / 1e6:,.1f} MB" if sizes else "empty"


def _say(text: str) -> None:
    Console().print(text, highlight=False, markup=False)
