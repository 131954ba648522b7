"""Steps per second of one and of two processes, beside the limit: `python -m tests.benchmarks.scaling`.

Each process has one thread. Two processes (gloo) share the work of a step: half of the kernels or of the images each.
The limit is two fits side by side with half of the work each, which exchange nothing: what the cores and the memory
allow. Recon-only and distillation of a ResNet20 with random weights, on noise in place of images. Run it on an
otherwise idle machine with at least two cores. Turns alternate; a table in Markdown has the fastest turn of each.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
from PIL import Image
from safetensors.torch import save_file

from tests.benchmarks.works import IMAGES, random_original

NETWORK = "cifar_resnet20"
#: Name -> options of the fit, steps before the measurement, and steps of it.
FITS = {
    "Recon-only, H=180": (["-c", "cifar10_h180", "--model.sampling.batch_size={kernels}"], 20, 200),
    f"distillation, H=180, {IMAGES} images": (
        ["-c", "cifar10_h180_noise", "--model.reconstruction.steps=1", "--data.batch_size={images}"],
        3,
        12,
    ),
}
KERNELS = 4096


class StepTimes(L.Callback):
    """Writes the mean seconds of the steps after the first ones.

    Args:
        file: The file, in JSON.
        skipped: The number of first steps.
    """

    def __init__(self, file: str, skipped: int) -> None:
        self.file, self.skipped = file, skipped

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == self.skipped:
            self._began = time.perf_counter()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            seconds = (time.perf_counter() - self._began) / (trainer.global_step - self.skipped)
            Path(self.file).write_text(json.dumps(seconds), encoding="utf-8")


def write_images(folder: Path) -> None:
    """Write a few images that validate, without which no fit starts; nothing is validated here."""
    for split in ("train", "val"):
        for name in range(10):
            (folder / split / str(name)).mkdir(parents=True)
            Image.new("RGB", (32, 32)).save(folder / split / str(name) / "0.png")


def seconds_per_step(folder: Path, name: str, share: int, fits: int, processes: int) -> float:
    """The mean seconds per step of fits side by side, of the slowest fit.

    Args:
        folder: For the fits, with the network's weights.
        name: Of `FITS`.
        share: Each process does one part of so many of a step's work.
        fits: The number of fits.
        processes: The number of processes of each fit.
    """
    options, skipped, steps = FITS[name]
    files = [folder / f"{number}.json" for number in range(fits)]
    commands = [_command(options, share, processes, skipped, steps, file) for file in files]
    logs = [file.with_suffix(".log") for file in files]
    started = [
        subprocess.Popen(command, stdout=log.open("wb"), stderr=subprocess.STDOUT)
        for command, log in zip(commands, logs, strict=True)
    ]
    for process, log in zip(started, logs, strict=True):
        if process.wait():
            raise SystemExit(f"{name}: a fit ended with an error.\n{log.read_text(encoding='utf-8')}")
    seconds: list[float] = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    return max(seconds)


def _command(options: Sequence[str], share: int, processes: int, skipped: int, steps: int, file: Path) -> list[str]:
    sizes = {"kernels": KERNELS // share, "images": IMAGES // share}  # of each process
    callback = {
        "class_path": "tests.benchmarks.scaling.StepTimes",
        "init_args": {"file": str(file), "skipped": skipped},
    }
    return [
        *(sys.executable, "-W", "ignore", "-m", "nernlit", "fit"),
        *(option.format(**sizes) for option in options),
        f"--model.representation.original.checkpoint={file.with_name('net.safetensors')}",
        *("--model.representation.order=none", "--data=FolderDataModule", f"--data.root={file.parent}"),
        *("--trainer.accelerator=cpu", f"--trainer.devices={processes}", "--threads=1"),
        *(f"--trainer.max_steps={skipped + steps}", "--trainer.limit_val_batches=0"),
        *(f"--trainer.logger.save_dir={file.with_suffix('')}", "--trainer.enable_progress_bar=false"),
        f"--trainer.callbacks+={json.dumps(callback)}",
    ]


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=3)
    turns = parser.parse_args().turns
    os.environ["OMP_NUM_THREADS"] = "1"
    print("| | 1 process, ms per step | 2 processes | limit | 1 / 2 processes | limit / 2 processes |")
    print("|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_file(random_original(NETWORK).net.state_dict(), folder / "net.safetensors")
        write_images(folder)
        for fit in FITS:
            found: dict[str, list[float]] = defaultdict(list)
            for _ in range(turns):
                for key, arrangement in {"one": (1, 1, 1), "two": (2, 1, 2), "limit": (2, 2, 1)}.items():
                    found[key].append(seconds_per_step(folder, fit, *arrangement))
            one, two, limit = (1e3 * min(found[key]) for key in ("one", "two", "limit"))
            print(f"| {fit} | {one:.1f} | {two:.1f} | {limit:.1f} | {one / two:.2f} | {limit / two:.2f} |", flush=True)


if __name__ == "__main__":
    main()
