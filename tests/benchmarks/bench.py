"""Time the parts on this machine: `make bench`, or `python tests/benchmarks/bench.py --json out.json`.

Every figure is a median of repeated runs with its spread (interquartile range); a step's share of the machine's
matrix-product rate is measured in the same run. Nothing is asserted.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import timm.optim
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch.utils.benchmark import Timer
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from nernlit.data.augment import pad_crop_flip
from nernlit.data.batches import BatchNumbers
from nernlit.data.sources import TensorImages
from nernlit.kernels import Uniform, addresses
from nernlit.losses import reconstruction_mse
from nernlit.modules import DecoupledDistill
from nernlit.modules.distilling import Precision
from nernlit.originals import Original
from nernlit.predictors import MLP, Trials
from nernlit.representation import Representation

BATCH = 4096


def seconds(work: Callable[[], object], least: float = 1.5) -> tuple[float, float]:
    """Median and interquartile range of one call."""
    work()
    measured = Timer("work()", globals={"work": work}, num_threads=torch.get_num_threads()).blocked_autorange(
        min_run_time=least
    )
    return measured.median, measured.iqr


def matrix_product_rate() -> float:
    """Floating-point operations a second of a square fp32 product."""
    left, right = torch.randn(2, 2048, 2048)
    return 2 * 2048**3 / seconds(lambda: left @ right)[0]


def recon_step(hidden: int, trials: int = 1) -> tuple[Callable[[], None], int]:
    """A step of Recon-only, or of a progressive round, on ResNet20, and its operations in linear layers.

    Sample, predict, compare, backward, Muon.
    """
    representation = Representation(_random_resnet20(), MLP(hidden, activation="gelu", base=0.9))
    predictors = Trials(representation.predictor, trials)
    predictors.reset(*range(trials))
    optimizer = timm.optim.Muon(predictors.parameters(), lr=0.02, momentum=0.9, nesterov=True)
    sampling, norms, step = Uniform(BATCH), representation.target.flatten(1).norm(dim=1), 0

    def work() -> None:
        nonlocal step
        step += 1
        rows = sampling.indices(norms, 0, step)
        predicted = predictors(representation.addresses[rows]) * representation.scale
        loss = reconstruction_mse(predicted, representation.target[rows].expand_as(predicted))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return work, 6 * BATCH * representation.predictor.num_params * trials


def _random_resnet20() -> Original:
    torch.manual_seed(0)
    original = Original("cifar_resnet20")
    original.weights_from = "random numbers, for timing"
    return original


def distillation(hidden: int, precision: Precision, images: int = 256) -> dict[str, Callable[[], None]]:
    """A distillation step on ResNet20 and the parts that it cannot do without, each alone."""
    module = DecoupledDistill(
        Representation(_random_resnet20(), MLP(hidden, activation="gelu", base=0.9)),
        optimizer=torch.optim.Adam,
        recon_steps=1,
        precision=precision,
    )
    module.stage = 1
    optimizer = torch.optim.Adam(module.trained_parameters(), lr=1e-3)
    batch = torch.rand(images, 3, 32, 32).contiguous(memory_format=torch.channels_last), torch.zeros(images).long()
    representation = module.representation
    weights = {key: value.detach().requires_grad_() for key, value in representation.weights().items()}

    def step() -> None:
        loss = torch.stack(list(module.loss_terms(batch).values())).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def teacher() -> None:
        with torch.inference_mode(), module.autocast():
            representation.original(batch[0])

    def student() -> None:
        with module.autocast():
            logits = representation(batch[0], weights)
        logits.float().square().sum().backward()

    def table() -> None:
        with module.autocast():
            kernels = representation.kernels()
        kernels.square().sum().backward()

    return {"step": step, "teacher": teacher, "student": student, "table": table}


def loader() -> Callable[[], None]:
    """An epoch of 10,000 CIFAR-sized images in batches of 256: shuffled, cropped, mirrored, as floats."""
    source = TensorImages(torch.randint(256, (10_000, 3, 32, 32), dtype=torch.uint8), torch.zeros(10_000))
    numbers = BatchNumbers(len(source), 256, training=True)
    generator = torch.Generator()

    def work() -> None:
        for batch in numbers:
            images, _ = source[batch]
            pad_crop_flip(images, 4, True, generator).float().div(255)

    return work


def torchvision_loader() -> Callable[[], None]:
    """The same work the published way: torchvision's transforms on one image after another, 1,000 images."""
    transform = v2.Compose(
        [v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip(), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    )
    images = [Image.fromarray(pixels) for pixels in torch.randint(256, (1_000, 32, 32, 3), dtype=torch.uint8).numpy()]

    class Published(Dataset[torch.Tensor]):
        def __len__(self) -> int:
            return len(images)

        def __getitem__(self, index: int) -> torch.Tensor:
            transformed: torch.Tensor = transform(images[index])
            return transformed

    batches = DataLoader(Published(), batch_size=256, shuffle=True)

    def work() -> None:
        for _ in batches:
            pass

    return work


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="file for the figures, to compare with another run")
    options = parser.parse_args()
    rate = matrix_product_rate()
    figures: dict[str, dict[str, float]] = {"fp32 matrix product": {"gflop_per_s": rate / 1e9}}
    for hidden in (64, 180, 300, 680):
        work, operations = recon_step(hidden)
        median, spread = seconds(work)
        figures[f"Recon-only step, H={hidden}, batch {BATCH}"] = {
            "ms": 1e3 * median,
            "spread_ms": 1e3 * spread,
            "share_of_matrix_product_rate": operations / median / rate,
        }
    for hidden in (64, 300):
        (one, _), (three, _) = recon_step(hidden), recon_step(hidden, trials=3)
        single, (median, spread) = seconds(one)[0], seconds(three)
        figures[f"three trials in one step, H={hidden}"] = {
            "ms": 1e3 * median,
            "spread_ms": 1e3 * spread,
            "of_one_trial": median / single,
        }
    precisions: tuple[Precision, ...] = ("fp32", "bf16")
    for precision in precisions:
        parts = {name: seconds(work) for name, work in distillation(140, precision).items()}
        (median, spread), alone = parts["step"], parts["teacher"][0] + parts["student"][0]
        figures[f"distillation step, ResNet20, H=140, 256 images, {precision}"] = {
            "ms": 1e3 * median,
            "spread_ms": 1e3 * spread,
            "of_both_cnns_alone": median / alone,
            "table_ms": 1e3 * parts["table"][0],
        }
    representation = Representation(_random_resnet20(), MLP(180))
    with torch.no_grad():
        median, spread = seconds(representation.weights)
    figures["decode of ResNet20, H=180"] = {"ms": 1e3 * median, "spread_ms": 1e3 * spread}
    state = representation.original.net.state_dict()
    for order in ("in_filter", "cross_filter"):
        median, spread = seconds(lambda: addresses(representation.layout, state, order), 0.1)  # noqa: B023
        figures[f"{order} order of ResNet20"] = {"ms": 1e3 * median, "spread_ms": 1e3 * spread}
    median, spread = seconds(loader())
    ours = 10_000 / median
    figures["loader, CIFAR-sized"] = {"ms": 1e3 * median, "spread_ms": 1e3 * spread, "images_per_s": ours}
    median, spread = seconds(torchvision_loader())
    theirs = 1_000 / median
    figures["torchvision, image by image, one process"] = {
        "ms": 1e3 * median,
        "spread_ms": 1e3 * spread,
        "images_per_s": theirs,
        "times_slower": ours / theirs,
    }

    table = Table(title=f"{torch.get_num_threads()} threads, torch {torch.__version__}", title_justify="left")
    for column in ("what", "ms", "spread ms", "further"):
        table.add_column(column)
    for what, values in figures.items():
        rest = {key: value for key, value in values.items() if key not in ("ms", "spread_ms")}
        further = ", ".join(f"{key} {value:,.2f}" for key, value in rest.items())
        cells = (f"{values[key]:.2f}" if key in values else "" for key in ("ms", "spread_ms"))
        table.add_row(what, *cells, further)
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
