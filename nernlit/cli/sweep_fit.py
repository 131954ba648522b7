"""What a sweep measures of each of its fits: sizes, accuracy on the test images, time and memory."""

import contextlib
import platform
import resource
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import final

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, Timer
from safetensors.torch import save
from torch import Tensor

from nernlit.analysis import correct_answers, paired_difference
from nernlit.cli.main import NernlitCLI
from nernlit.cli.sweep_table import Row
from nernlit.cli.trainer import tests_all_images
from nernlit.errors import UsageError
from nernlit.storage.files import write_atomically
from nernlit.training import Scheme


def forget_peak_memory() -> None:
    """Reset the peak memory of this process, on systems that support it."""
    with contextlib.suppress(OSError):  # Linux has it
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_mib() -> float:
    """The process's peak since `forget_peak_memory`; on systems that do not know it, since the process started."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    unit = 2**20 if sys.platform == "darwin" else 2**10  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


@final
class Testable(Callback):
    """Refuse, before it starts, a fit that cannot be tested at its end, and measure its validations.

    Args:
        select: `best` or `last`, the checkpoint that will be tested.

    Attributes:
        validating: Seconds of all validations so far; Lightning's timer knows those of the last one.
    """

    def __init__(self, select: str) -> None:
        self.select = select
        self.validating = self._began = 0.0

    def state_dict(self) -> dict[str, float]:
        return {"validating": self.validating}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        self.validating = state_dict["validating"]

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._began = time.monotonic()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self.validating += time.monotonic() - self._began

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if not getattr(getattr(trainer, "datamodule", None), "has_images", True):
            raise UsageError("a sweep compares accuracies, and there are no images (`data: null`); name the data.")
        if not isinstance(pl_module, Scheme):
            raise UsageError(
                f"{type(pl_module).__name__} does not train a representation; `nernlit sweep` needs a scheme that does."
            )
        if not tests_all_images(trainer):
            raise UsageError(
                f"--trainer.limit_test_batches {trainer.limit_test_batches}: a sweep tests on all images; leave it out."
            )
        written = [each for each in trainer.checkpoint_callbacks if isinstance(each, ModelCheckpoint)]
        if not any(each.filename == self.select and each.save_top_k and each.dirpath is None for each in written):
            raise UsageError(
                f"the fit would write no checkpoints/{self.select}.ckpt in its folder, which is what a sweep tests; "
                "leave out the options of its checkpoints."
            )


def fit_timer(trainer: Trainer) -> Timer:
    """The timer of a fit, which continues in a resumed fit."""
    return next(callback for callback in _callbacks(trainer) if isinstance(callback, Timer))


def _callbacks(trainer: Trainer) -> list[Callback]:
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set by a connector
    return callbacks


def measure(cli: NernlitCLI, select: str) -> Row:
    """Test a checkpoint of a fit that has just ended, and keep which test images it classifies correctly.

    Args:
        cli: The fit.
        select: `best` or `last`, the checkpoint.

    Raises:
        UsageError: If there is no such checkpoint.
    """
    trainer, module = cli.trainer, cli.model
    assert isinstance(module, Scheme)
    seconds = fit_timer(trainer).time_elapsed("train")
    validating = next(each.validating for each in _callbacks(trainer) if isinstance(each, Testable))
    steps = trainer.global_step
    peak = peak_memory_mib()
    folder = Path(str(trainer.log_dir))
    checkpoint = folder / "checkpoints" / f"{select}.ckpt"
    if not checkpoint.is_file():
        raise UsageError(
            f"the fit wrote no {checkpoint}: there is nothing to test; let it validate and keep checkpoints."
        )
    trainer.test(module, cli.datamodule, ckpt_path=str(checkpoint), verbose=False)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    answers = _answers(module, cli)
    write_atomically(folder / "test_correct.safetensors", save(answers))
    difference = paired_difference(answers["reconstructed"], answers["original"])
    sizes = module.representation.sizes(**module.save_options)
    return {
        "hidden": _hidden(module),
        "host": platform.node(),  # times and memory are those of this machine
        "cr_paper": sizes.cr_paper,
        "cr_file": sizes.cr_file,
        **{name: metrics[f"test/{name}"] for name in ("acc_original", "acc", "recon_rmse", "explained_power")},
        "difference": difference.difference,
        "difference_low": difference.low,
        "difference_high": difference.high,
        "p_value": difference.p_value,
        "fit_seconds": seconds,
        "steps_per_second": steps / max(seconds - validating, 1e-9),
        "peak_memory_mib": peak,
    }


def _hidden(module: Scheme) -> str:
    return str(module.representation.predictor.unquantized.specification()["init_args"].get("hidden", ""))


@torch.no_grad()
def _answers(module: Scheme, cli: NernlitCLI) -> dict[str, Tensor]:
    """Which test images both networks classify correctly, in the dataset's order: what paired tests need."""
    representation, data, device = module.representation, cli.datamodule, module.representation.target.device

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for batch in data.test_dataloader()[0]:
            pixels, labels = data.on_after_batch_transfer(batch, 0)
            yield pixels.to(device), labels.to(device)

    entries = representation.stored_entries(**module.save_options)  # of the file whose size the table states
    networks: dict[str, Callable[[Tensor], Tensor]] = {
        "reconstructed": partial(representation.original, weights=entries),
        "original": representation.original,
    }
    return {name: correct_answers(classify, batches()).cpu() for name, classify in networks.items()}
