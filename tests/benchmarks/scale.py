"""Time and memory on a data set of ImageNet's size: `python -m tests.benchmarks.scale --images 1300000`, on Linux.

The images are a few hundred JPEGs, hard-linked under many names in ImageNet's 1,000 class folders: they take inodes and
decoding, but hardly any disk space. Networks have random weights. Each part runs in a process of its own, with one
thread. A table in Markdown has CPU seconds of the process and its workers, and GiB of memory. The files are removed.
"""

import argparse
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile
from multiprocessing import Process
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.data import ImageNetInfo

from nernlit.data import ImageNetDataModule, base
from nernlit.data.augment import Draws
from nernlit.data.decode import read_image
from nernlit.data.sources import FileImages
from tests.benchmarks.large import resident
from tests.benchmarks.works import random_original
from tests.fakes import CONFIGS

#: Different images, and their size in pixels.
DISTINCT, SIZE = 300, (224, 256)
#: A network with 1,000 classes whose forward pass takes less time than decoding an image.
SMALL = "test_resnet"
#: Images of the loader's measurement, per batch; and the counts of images after which memory is compared.
BATCH, EARLY, LATE = 100, 1_000, 5_000
#: Share of the training images that validate: few enough to leave the loader's figures alone.
DATA = {"val_share": 1e-4, "eval_batch_size": BATCH, "batch_size": BATCH}
#: A ResNet50 with all weights in kernels of 7x7, as `compress` stores one.
ALL_WEIGHTS = ["--model.representation.layers=all", "--model.representation.pointwise=tile"]
PREDICTORS = {
    "Table": [],
    "Codebooks": ["--model.representation.predictor.codebooks=2", "--model.representation.predictor.bits=8"],
}
Figures = dict[str, Any]


def write_files(root: Path, images: int, tested: int) -> None:
    """Write the tree `<root>/{train,val}/<WordNet id>/<number>.JPEG`."""
    generator = np.random.default_rng(0)
    originals = root / "distinct"
    originals.mkdir(parents=True)
    for number in range(DISTINCT):
        coarse = generator.integers(0, 256, (14, 16, 3), dtype=np.uint8)
        pixels = np.asarray(Image.fromarray(coarse).resize(SIZE[::-1], Image.Resampling.BICUBIC)).astype(np.int16)
        noisy = (pixels + generator.normal(0, 12, pixels.shape)).clip(0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(originals / f"{number}.jpg", quality=85)
    classes = sorted(ImageNetInfo().label_names())
    for split, count in (("train", images), ("val", tested)):
        for name in classes:
            (root / split / name).mkdir(parents=True)
        for number in range(count):
            name = classes[number % len(classes)]
            os.link(originals / f"{number % DISTINCT}.jpg", root / split / name / f"{name}_{number}.JPEG")


def cpu_seconds() -> float:
    """CPU seconds of this process and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def memory_mib(process: int | None = None) -> float:
    """MiB of memory that a process holds, this one by default."""
    return float(psutil.Process(process).memory_info().rss / 2**20)


def data_module(root: Path, workers: int = 0) -> ImageNetDataModule:
    base._IN_MEMORY_BYTES = 0  # fewer images than ImageNet's are read like ImageNet's
    data = ImageNetDataModule(str(root), num_workers=workers, resized_crop=0.08, flip=True, **DATA)
    data.setup("fit")
    return data


def listing(root: Path) -> Figures:
    """List the training images and split a part of them off."""
    before, cpu, began = resident("VmRSS"), cpu_seconds(), time.perf_counter()
    data = data_module(root)
    count = len(data.sources["train"])
    seconds, wall, after = cpu_seconds() - cpu, time.perf_counter() - began, resident("VmRSS")
    return {
        "images": count,
        "cpu_s": seconds,
        "wall_s": wall,
        "gib_before": before,
        "gib_after": after,
        "peak_gib": resident("VmHWM"),
        "bytes_per_image": (after - before) * 2**30 / count,
    }


def loading(root: Path, workers: int = 2, turns: int = 2) -> Figures:
    """The loader and decoding alone in turns, and the memory of the main process and of each worker over the images."""
    data = data_module(root, workers)
    memory: dict[int, list[float]] = {}
    loaded, alone = [], []
    if len(data.sources["train"]) < LATE:
        raise SystemExit(f"--images: at least {LATE} are needed, and some more that validate.")

    def augmented(images: torch.Tensor, step: int) -> None:
        data.augmentation(images, Draws(step))

    def load(watch: bool) -> None:
        batches = iter(data.train_dataloader())
        for step in range(LATE // BATCH):
            images, _ = next(batches)
            augmented(images, step)
            if watch and (step + 1) * BATCH % EARLY == 0:
                processes = [None, *(worker.pid for worker in batches._workers)]  # type: ignore[attr-defined]
                memory[(step + 1) * BATCH] = [memory_mib(process) for process in processes]

    def decode(own: Sequence[Sequence[int]]) -> None:
        source = data.sources["train"]
        assert isinstance(source, FileImages)
        for step, batch in enumerate(own):
            images = [torch.from_numpy(read_image(source.paths[i], 3, source.fitting)) for i in batch]
            augmented(torch.stack(images).permute(0, 3, 1, 2), step)

    def decode_in_processes() -> None:
        chosen = torch.randperm(len(data.sources["train"]))[:LATE].split(BATCH)
        shares = [[batch.tolist() for batch in chosen[rank::workers]] for rank in range(workers)]
        processes = [Process(target=decode, args=(share,)) for share in shares]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
            assert process.exitcode == 0

    for turn in range(turns):
        for work, seconds in ((lambda: load(turn == 0), loaded), (decode_in_processes, alone)):  # noqa: B023
            before = cpu_seconds()
            work()
            seconds.append(cpu_seconds() - before)
    return {
        "loader_ms_per_image": 1e3 * min(loaded) / LATE,
        "alone_ms_per_image": 1e3 * min(alone) / LATE,
        "throughput_of_decoding_alone": [one / other for one, other in zip(alone, loaded, strict=True)],
        **{f"mib_after_{count}": mib for count, mib in memory.items()},
        "peak_gib": resident("VmHWM"),
    }


def command(args: Sequence[str]) -> Figures:
    """A command of nernlit, and the memory of its process as images are decoded."""
    from nernlit.cli.main import main

    decoded, memory = 0, {}
    original = FileImages.__getitem__

    def counted(self: FileImages, indices: Sequence[int]) -> Any:
        nonlocal decoded
        found = original(self, indices)
        before, decoded = decoded, decoded + len(indices)
        if before // LATE < decoded // LATE or before < EARLY <= decoded:
            memory[decoded] = memory_mib()
        return found

    FileImages.__getitem__ = counted  # type: ignore[method-assign]
    main(args)
    late = [mib for count, mib in memory.items() if count >= LATE]
    figures = {"decoded": decoded, "mib_early": next(iter(memory.values()), None), "cpu_s": cpu_seconds()}
    return {**figures, "mib_late": [min(late), max(late)] if late else None, "peak_gib": resident("VmHWM")}


PARTS: dict[str, Callable[[Path], Figures]] = {"listing": listing, "loading": loading}


def _own_process(folder: Path, part: str, args: Sequence[str]) -> Figures:
    """Run a part in a process of its own; what it prints passes through, after the second in which it came."""
    out = folder / "figures.json"
    out.unlink(missing_ok=True)
    call = [sys.executable, "-W", "ignore", "-m", "tests.benchmarks.scale", "--out", str(out), "--part", part, "--"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "160"}
    began = time.monotonic()
    with subprocess.Popen(
        [*call, *args], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(f"{time.monotonic() - began:7.1f} s  {line.rstrip()}", file=sys.stderr, flush=True)
    if process.returncode or not out.is_file():
        raise SystemExit(f"{part} {' '.join(args)} ended with exit code {process.returncode}.")
    figures: Figures = json.loads(out.read_text())
    return figures


def _commands(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Name of a row, and the command."""
    root = folder / "images"
    for network in (SMALL, "resnet50"):
        state = random_original(network).net.state_dict()
        save_file(state, folder / f"{network}.safetensors")

    def fit(name: str, network: str, *options: str) -> list[str]:
        original = "--model.representation.original"
        return [
            *("fit", "-c", str(CONFIGS / "base/recon_only.yaml"), "-c", str(CONFIGS / "base/representation.yaml")),
            "--threads=1",
            *(f"{original}.name={network}", f"{original}.checkpoint={folder / network}.safetensors"),
            *("--model.representation.order=none", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"),
            *(f"--trainer.logger.save_dir={folder}", f"--trainer.logger.name={name}", "--trainer.max_epochs=1"),
            *("--trainer.check_val_every_n_epoch=1", "--trainer.num_sanity_val_steps=0"),
            *options,
        ]

    data = [f"--data.{name}={value}" for name, value in DATA.items()]
    data = ["--data=ImageNetDataModule", f"--data.root={root}", f"--data.model={SMALL}.r160_in1k", *data]
    data += ["--data.train_on=none", "--data.steps_per_epoch=5"]
    small = fit("small", SMALL, "--model.representation.predictor.hidden=16", *data)
    yield f"fit, {SMALL}", small
    # Not `validate`, which uses a share of the training images.
    yield f"test, {SMALL}", ["test", *small[1:], "--ckpt_path=best"]
    yield f"report, {SMALL}", ["report", f"{folder}/small", f"--out={folder}/report.html"]
    yield (
        f"analyze, {SMALL}",
        ["analyze", "interpolate", f"{folder}/small", "--points=1", "--low=1", f"--out={folder}/analysis"],
    )
    for name, own in PREDICTORS.items():
        chosen = [f"--model.representation.predictor={name}", "--model.representation.predictor.kernel_size=7", *own]
        steps = ["--data=null", "--data.steps_per_epoch=1"]
        yield f"fit, resnet50, {name}", fit(name, "resnet50", *ALL_WEIGHTS, *chosen, *steps)
        yield f"export, resnet50, {name}", ["export", f"{folder}/{name}", "-o", f"{folder}/{name}.nern"]


def _needing(fit: str, rows: Sequence[tuple[str, str, list[str]]]) -> set[str]:
    """The rows that read the run of a fit: all after it, up to the next fit. Other rows are needed by none."""
    names = [name for name, _, _ in rows]
    if not fit.startswith("fit"):
        return set()
    after = names[names.index(fit) + 1 :]
    return set(takewhile(lambda name: not name.startswith("fit"), after))


def _shown(value: object) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_shown, value))}]"
    return f"{value:,.3g}" if isinstance(value, float) and value < 100 else f"{value:,.0f}" if value else "-"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1_300_000, help="training images")
    parser.add_argument("--tested", type=int, default=50_000, help="images of the validation folder")
    parser.add_argument(
        "--only", default="", help="rows whose name this regular expression matches, and the fits they need"
    )
    parser.add_argument("--tmpdir", help="where the files are written")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("args", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        torch.set_num_threads(1)
        part = options.part
        figures = PARTS[part](Path(options.args[0])) if part in PARTS else command(options.args)
        options.out.write_text(json.dumps(figures))
        return
    folder = Path(tempfile.mkdtemp(prefix="nernlit_scale_", dir=options.tmpdir))
    try:
        cpu, began = cpu_seconds(), time.perf_counter()
        write_files(folder / "images", options.images, options.tested)
        took = f"{cpu_seconds() - cpu:.0f} CPU seconds, {time.perf_counter() - began:.0f} s"
        print(f"{options.images:,} and {options.tested:,} image files in {took}\n\n| part | figures |\n|---|---|")
        rows = [(name, name, [str(folder / "images")]) for name in PARTS]
        rows += [(name, "command", args) for name, args in _commands(folder)]
        chosen = {name for name, _, _ in rows if re.search(options.only, name)}
        for name, part, args in rows:
            if name in chosen or chosen & _needing(name, rows):
                figures = _own_process(folder, part, args)
                print(
                    f"| {name} | {', '.join(f'{key} {_shown(value)}' for key, value in figures.items())} |", flush=True
                )
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
