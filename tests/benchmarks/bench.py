"""Time the parts on this machine: `make bench`, or `python tests/benchmarks/bench.py --json out.json`.

The matrix-product rate comes first. Every figure is a median of repeated runs with its spread (interquartile range),
and is printed as a share of that rate or as a ratio to something measured beside it. Nothing is asserted.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from nernlit.kernels.orders import OrderName, positions
from nernlit.training.scheme import Precision
from tests.benchmarks import busy, works
from tests.benchmarks.step import SCHEMES
from tests.benchmarks.works import Work

Figures = dict[str, float]


def seconds(work: Work, least: float = 1.5) -> tuple[float, float]:
    """Median and interquartile range of one call: at least three calls and `least` seconds, after one to warm up."""
    work()
    times: list[float] = []
    while len(times) < 3 or sum(times) < least:
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    low, median, high = statistics.quantiles(times, n=4)
    return median, high - low


def line(work: Work, **further: Callable[[float], float]) -> Figures:
    """The figures of a piece of work; `further` ones are functions of its median seconds."""
    median, spread = seconds(work)
    return {"ms": 1e3 * median, "spread_ms": 1e3 * spread} | {name: of(median) for name, of in further.items()}


def matrix_product_rate(kind: torch.dtype) -> float:
    """Floating-point operations a second of a square product."""
    left, right = torch.randn(2, 2048, 2048).to(kind)
    return 2 * 2048**3 / seconds(lambda: left @ right)[0]


def lines() -> Iterator[tuple[str, Callable[[], Figures]]]:
    """Every line's name, and the function that measures it."""
    rates: dict[str, float] = {}

    def product(name: str, kind: torch.dtype) -> Figures:
        rates[name] = matrix_product_rate(kind)
        return {"gflop_per_s": rates[name] / 1e9}

    yield "matrix product, fp32", lambda: product("fp32", torch.float32)
    yield "matrix product, bf16", lambda: product("bf16", torch.bfloat16)

    def recon(hidden: int, batch: int) -> Figures:
        work, operations = works.recon_step(hidden, batch)
        return line(work, of_fp32_rate=lambda s: operations / s / rates["fp32"])

    def recon_bf16(hidden: int) -> Figures:
        fp32 = seconds(works.recon_step(hidden)[0])[0]
        work, operations = works.recon_step(hidden, precision="bf16")
        ratios = {"of_bf16_rate": lambda s: operations / s / rates["bf16"], "times_as_fast_as_fp32": lambda s: fp32 / s}
        return line(work, **ratios)

    for hidden, batch in ((64, 4096), (180, 4096), (300, 1024), (300, 4096), (300, 16384), (680, 4096), (1372, 4096)):
        yield f"Recon-only step, H={hidden}, {batch} kernels", lambda h=hidden, b=batch: recon(h, b)
    for hidden in (64, 180, 300, 680, 1372):
        yield f"Recon-only step, H={hidden}, 4096 kernels, bf16", lambda h=hidden: recon_bf16(h)

    def trials(hidden: int) -> Figures:
        one = seconds(works.recon_step(hidden)[0])[0]
        return line(works.recon_step(hidden, trials=3)[0], of_one_trial=lambda s: s / one)

    for hidden in (64, 300):
        yield f"three trials in one step, H={hidden}", lambda h=hidden: trials(h)

    def image_step(kind: str, precision: Precision) -> Figures:
        parts = works.image_steps(140, precision)
        teacher, student, table = (seconds(parts[name])[0] for name in ("teacher", "student", "table"))
        return {
            **line(parts[kind], of_both_cnns_alone=lambda s: s / (teacher + student)),
            "teacher_ms": 1e3 * teacher,
            "student_ms": 1e3 * student,
            "table_ms": 1e3 * table,
        }

    for kind in ("distillation", "joint"):
        for precision in ("fp32", "bf16"):
            name = f"{kind} step, ResNet20, H=140, {works.IMAGES} images, {precision}"
            yield name, lambda k=kind, p=precision: image_step(k, p)

    for name, hidden in (("cifar_resnet20", 180), ("cifar_resnet56", 360)):
        yield f"decode, {name}, H={hidden}", lambda n=name, h=hidden: line(works.decode(n, h))

    def order(name: str, which: OrderName) -> Figures:
        net = works.random_original(name).net
        weights = [w for key, w in net.state_dict().items() if w.dim() == 4 and w.shape[2:].numel() == 9]
        began = time.perf_counter()
        for weight in weights:
            positions(weight, which)
        return {"ms": 1e3 * (time.perf_counter() - began), "kernels": sum(w.shape[:2].numel() for w in weights)}

    positions(torch.randn(4, 4, 3, 3), "cross_filter")  # compiled, or loaded from the compiler's cache
    for name in ("cifar_resnet20", "cifar_resnet56", "resnet18"):
        for which in ("in_filter", "cross_filter"):
            yield f"{which} order, {name}, one thread", lambda n=name, w=which: order(n, w)

    def loading() -> Figures:
        theirs = 1_000 / seconds(works.torchvision_loader())[0]
        rate = {"images_per_s": lambda s: 10_000 / s, "of_torchvision_by_image": lambda s: 10_000 / s / theirs}
        return line(works.loader(), **rate)

    yield "loader, 10,000 CIFAR-sized images", loading

    def evaluating() -> Figures:
        work, alone = works.evaluation()
        least = seconds(alone)[0]
        return line(work, of_both_cnns_alone=lambda s: s / least)

    yield "evaluation, 2,048 images, ResNet20", evaluating

    def robustness() -> Figures:
        work, alone = works.robustness()
        least = seconds(alone)[0]
        return line(work, of_its_cnn_passes_alone=lambda s: s / least)

    yield "test: clean, 45 corrupted and 4 attacked settings, 256 images, ResNet20", robustness

    def started(*command: str) -> Figures:
        def work() -> None:
            subprocess.run([sys.executable, *command], check=True, capture_output=True)

        return line(work)

    yield "start: import nernlit", lambda: started("-c", "import nernlit")
    yield "start: lightning --help", lambda: started("-m", "nernlit", "--help")
    yield "start: import all of it", lambda: started("-c", "import nernlit.cli.main")

    def at_scale(*what: str) -> Figures:
        command = [sys.executable, "-m", "tests.benchmarks.step", *what]
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        figures: Figures = json.loads(printed)
        return {"ms": 1e3 * figures.pop("step_s"), **figures}

    for network in ("cifar_resnet20", "cifar_resnet56", "resnet18", "resnet50"):
        name = f"scale: distillation step, {network}, all convolutions, H=256"
        yield name, lambda n=network: at_scale(n, "all_convs", "256", "decoupled")
    for scheme in SCHEMES:
        yield (
            f"scale: {scheme} step, resnet18, stages_3x3, H=1372",
            lambda s=scheme: at_scale("resnet18", "stages_3x3", "1372", s),
        )
    steps = 2_000

    def idle_cost() -> Figures:
        fixed, adapting = [], []
        for _ in range(3):  # in turns: the machine's own drift falls on both
            fixed += busy.seconds_of(busy.started(torch.get_num_threads(), steps))
            adapting += busy.seconds_of(busy.started("auto", steps))
        return {"steps_per_s": steps / min(adapting), "of_a_fixed_number": min(adapting) / min(fixed)}

    yield "busy: a fit alone, adapting its threads", idle_cost
    for threads in ("auto", torch.get_num_threads(), 1):
        yield (
            f"busy: a fit beside a busy process, {threads} threads",
            partial(busy.beside_a_busy_process, threads, steps),
        )
        yield f"busy: two fits at once, {threads} threads", partial(busy.side_by_side, threads, steps)
    yield "peak memory of all lines above", lambda: {"gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="lines whose name has this in it (and the matrix products)")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--against", type=Path, help="such a file of an earlier run: prints this run's time over its")
    options = parser.parse_args()
    earlier: dict[str, Figures] = json.loads(options.against.read_text()) if options.against else {}
    table = Table(title=f"{torch.get_num_threads()} threads, torch {torch.__version__}", title_justify="left")
    for column in ("what", "ms", "spread ms", *(["of earlier"] if earlier else []), "further"):
        table.add_column(column)
    console, figures = Console(), dict[str, Figures]()
    with console.status("") as status:
        for name, measure in lines():
            if options.only not in name and not name.startswith("matrix product"):
                continue
            status.update(name)
            try:
                values = figures[name] = measure()
            except Exception as problem:  # the other lines are worth their minutes
                table.add_row(name, *[""] * (len(table.columns) - 2), f"failed: {problem!r}")
                continue
            if options.json:
                options.json.write_text(json.dumps(figures, indent=2))
            times = [f"{values[key]:.2f}" if key in values else "" for key in ("ms", "spread_ms")]
            if earlier:
                known = "ms" in values and "ms" in earlier.get(name, {})
                times.append(f"{values['ms'] / earlier[name]['ms']:.2f}" if known else "")
            rest = {key: value for key, value in values.items() if key not in ("ms", "spread_ms")}
            table.add_row(name, *times, ", ".join(f"{key} {value:,.2f}" for key, value in rest.items()))
    console.print(table)


if __name__ == "__main__":
    main()
