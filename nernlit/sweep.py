"""`nernlit sweep`: fit configurations at several hidden widths and seeds, test each, and tabulate.

A fit that is already in the table is not run again, so that an interrupted sweep goes on where it stopped. It counts as
the same while its options and the contents of its configuration files are. Every fit takes one device.
"""

import argparse
import contextlib
import csv
import hashlib
import itertools
import resource
import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from lightning.pytorch.callbacks import Callback, Timer
from rich import box
from rich.console import Console
from rich.table import Table
from safetensors.torch import save
from torch import Tensor

from nernlit.analysis import correct_answers, paired_difference, tradeoff_figure, width_figure
from nernlit.base_files import expand_bases
from nernlit.cli import NernlitCLI, run
from nernlit.errors import UsageError
from nernlit.files import write_atomically, write_figure, write_table
from nernlit.modules import ReconstructionModule

_COLUMNS = {
    "cr_paper": ("CR", "{:.1%}"),
    "acc": ("acc", "{:.2%}"),
    "difference": ("- orig.", "{:+.2%}"),
    "recon_rmse": ("RMSE", "{:.4f}"),
    "fit_seconds": ("fit s", "{:.0f}"),
    "peak_memory_mib": ("MiB", "{:.0f}"),
}
Row = dict[str, float | str]


def main(args: Sequence[str]) -> None:
    """Run the command with these arguments; those it does not know go to `fit` as they are."""
    parser = argparse.ArgumentParser(
        prog="nernlit sweep",
        description=__doc__,
        epilog="All other options are those of `nernlit fit`.",
        allow_abbrev=False,
    )
    parser.add_argument("--configs", nargs="+", required=True, help="configurations to compare")
    parser.add_argument("--hidden", type=int, nargs="+", help="hidden widths (default: the configuration's own)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="one fit a width and seed (default: 0)")
    parser.add_argument("--out", type=Path, default=Path("runs/sweep"), help="folder of the table and the figure")
    parser.add_argument("--select", choices=("best", "last"), default="best", help="checkpoint that is tested")
    options, fit_args = parser.parse_known_args(args)
    _require_one_device(fit_args)
    options.out.mkdir(parents=True, exist_ok=True)
    table = options.out / "sweep.csv"
    rows = _read(table)
    settings = " ".join(fit_args)
    chosen = []
    for config in options.configs:
        for hidden in options.hidden or [None]:
            for seed in options.seeds:
                key = {"config": Path(config).stem, "seed": str(seed), "select": options.select, "settings": settings}
                key |= {"asked_hidden": str(hidden or ""), "files": _fingerprint(config, fit_args)}
                row = next((row for row in rows if key.items() <= row.items()), None)
                if row is None:
                    row = {**key, **_fit(config, hidden, seed, options.select, options.out, fit_args)}
                    rows.append(row)
                    write_table(table, rows)
                chosen.append(row)
    names = dict.fromkeys(str(row["config"]) for row in chosen)
    figure = tradeoff_figure(
        {
            name: [(float(row["cr_paper"]), float(row["acc"])) for row in chosen if row["config"] == name]
            for name in names
        },
        float(chosen[0]["acc_original"]),
        "accuracy against size",
    )
    write_figure(options.out / "sweep.png", figure)
    by_width = {
        name: [
            (int(row["hidden"]), float(row["acc"]), float(row["recon_rmse"]))
            for row in chosen
            if row["config"] == name and row["hidden"]  # a predictor of one's own may have no width
        ]
        for name in names
    }
    write_figure(options.out / "widths.png", width_figure(by_width, float(chosen[0]["acc_original"])))
    console = Console()
    console.print(_summary(chosen))
    console.print(f"table: {table}\nfigures: {options.out / 'sweep.png'}, widths.png", soft_wrap=True, highlight=False)
    console.print(f"TensorBoard: tensorboard --logdir {options.out}", soft_wrap=True, highlight=False)


def _fit(config: str, hidden: int | None, seed: int, select: str, out: Path, fit_args: Sequence[str]) -> Row:
    logger = "--trainer.logger.init_args"
    width = [f"--model.init_args.representation.predictor.init_args.hidden={hidden}"] if hidden else []
    name = "_".join([Path(config).stem, *([f"h{hidden}"] if hidden else []), f"seed{seed}"])
    named = [f"--seed_everything={seed}", f"{logger}.save_dir={out}", f"{logger}.name={name}"]
    _forget_peak_memory()
    return _measure(run(["fit", "-c", config, "--trainer.devices=1", *fit_args, *width, *named]), select)


def _require_one_device(fit_args: Sequence[str]) -> None:
    """Several processes would each see a share of the test images, and all write the same table."""
    for arg, following in itertools.pairwise([*fit_args, ""]):
        flag, _, value = arg.partition("=")
        if flag in ("--trainer.devices", "--trainer.num_nodes") and (value or following) != "1":
            raise UsageError(f"{flag} {value or following}: a sweep's fits run on one device; leave it out.")


def _fingerprint(config: str, fit_args: Sequence[str]) -> str:
    """A hash of the contents of all configuration files of a fit, in their order."""
    content = hashlib.sha256()
    args = expand_bases(["-c", config, *fit_args])
    for flag, value in itertools.pairwise(args):
        if flag == "-c":
            content.update(Path(value).read_bytes())
    return content.hexdigest()[:12]


def _forget_peak_memory() -> None:
    with contextlib.suppress(OSError):  # Linux has it
        Path("/proc/self/clear_refs").write_text("5")


def _peak_memory_mib() -> float:
    """Of this process since `_forget_peak_memory`; where a system does not know that, of all fits so far."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _measure(cli: NernlitCLI, select: str) -> Row:
    trainer, module = cli.trainer, cli.model
    if not cli.datamodule.has_images:
        raise UsageError("a sweep compares accuracies, and there are no images (`data: null`); name the data.")
    assert isinstance(module, ReconstructionModule)
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set by a connector
    timer = next(callback for callback in callbacks if isinstance(callback, Timer))
    seconds, validating = timer.time_elapsed("train"), timer.time_elapsed("validate")
    steps = trainer.global_step
    peak = _peak_memory_mib()
    folder = Path(str(trainer.log_dir))
    trainer.test(module, cli.datamodule, ckpt_path=str(folder / "checkpoints" / f"{select}.ckpt"), verbose=False)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    answers = _answers(module, cli)
    write_atomically(folder / "test_correct.safetensors", save(answers))
    difference = paired_difference(answers["reconstructed"], answers["original"])
    return {
        "hidden": _hidden(module),
        "folder": str(folder),
        "cr_paper": module.representation.sizes().cr_paper,
        **{name: metrics[f"test/{name}"] for name in ("acc_original", "acc", "recon_rmse", "variance_explained")},
        "difference": difference.difference,
        "difference_low": difference.low,
        "difference_high": difference.high,
        "p_value": difference.p_value,
        "fit_seconds": seconds,
        "steps_per_second": steps / max(seconds - validating, 1e-9),
        "peak_memory_mib": peak,
    }


def _hidden(module: ReconstructionModule) -> str:
    arguments = module.hparams["representation"]["predictor"].get("init_args", {})
    return str(arguments.get("hidden", ""))


@torch.no_grad()
def _answers(module: ReconstructionModule, cli: NernlitCLI) -> dict[str, Tensor]:
    """Which test images both networks classify correctly, in the dataset's order: what paired tests need."""
    representation, data, device = module.representation, cli.datamodule, module.representation.target.device

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for batch in data.test_dataloader()[0]:
            pixels, labels = data.on_after_batch_transfer(batch, 0)
            yield pixels.to(device), labels.to(device)

    reconstructed = partial(representation, weights=representation.weights())
    networks: dict[str, Callable[[Tensor], Tensor]] = {
        "reconstructed": reconstructed,
        "original": representation.original,
    }
    return {name: correct_answers(classify, batches()).cpu() for name, classify in networks.items()}


def _read(path: Path) -> list[Row]:
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        rows: list[Row] = [dict(row) for row in csv.DictReader(file)]
    if rows and "files" not in rows[0]:
        raise UsageError(f"{path} is no table of this version of nernlit; pass another folder as --out.")
    return rows


def _summary(rows: Sequence[Row]) -> Table:
    """A line a configuration and width: the mean over seeds, with the standard deviation where there are several."""
    original = float(rows[0]["acc_original"])
    table = Table(
        title=f"test (original {original:.2%})", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    table.add_column("configuration", overflow="fold")
    for column in ("H", *(column for column, _ in _COLUMNS.values())):
        table.add_column(column, justify="right", no_wrap=True)
    for config, hidden in dict.fromkeys((row["config"], row["hidden"]) for row in rows):
        cells = []
        for name, (_, form) in _COLUMNS.items():
            values = [float(row[name]) for row in rows if (row["config"], row["hidden"]) == (config, hidden)]
            cell = form.format(statistics.fmean(values))
            if len(values) > 1 and name == "acc":
                cell += f" ±{form.format(statistics.stdev(values))}"
            cells.append(cell)
        table.add_row(str(config), str(hidden), *cells)
    return table
