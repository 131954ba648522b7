"""`nernlit compress`: compress a trained network into a small file, and measure the accuracy of the stored network."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from rich.console import Console

from nernlit.cli.arguments import CommandParser, count, path, positive, require_writable, split_options
from nernlit.cli.export import print_sizes, test
from nernlit.cli.fits import SavedAtEnd, continued_fit, epoch_options
from nernlit.cli.inputs import (
    ORIGINAL,
    network_options,
    original_of,
    refuse_own_options_and_files,
    refuse_test_options,
    require_images,
)
from nernlit.cli.main import NernlitCLI
from nernlit.cli.runs import data_module, require_dataset
from nernlit.errors import UsageError
from nernlit.originals import description
from nernlit.training import Scheme, take_class_names
from nernlit.training.compression import BITS, quantized_table
from nernlit.utilities.sides import Size
from nernlit.utilities.signals import Interrupted

_EPOCHS = 30
#: A file that exceeds its planned size by more than this factor is reported.
_TOLERANCE = 1.02
#: Search for the smallest file: bits per weight at the start, factors of a step down and up, and limits.
_FIRST_BITS, _DOWN_FACTOR, _UP_FACTOR, _MIN_BITS, _MAX_BITS = 2.0, 0.8, 1.5, 0.3, 8.0


def compress(args: Sequence[str]) -> None:
    """`nernlit compress NET -o FILE --data CLASS --data.root DIR`: store a trained network as a small .nern file.

    The weights are quantized with learned step sizes and trained by distillation from the network itself; the size of
    the file is a term of the loss. To continue after an interruption, run the same command again. Example, for a folder
    with `train/<class>/<image>` and `test/`:

        nernlit compress resnet18.safetensors --network resnet18 -o small.nern \\
            --data FolderDataModule --data.root DIR --data.image_size 224
    """
    parser = CommandParser("compress", compress.__doc__, "All other options are those of `nernlit fit`.")
    parser.add_network()
    parser.add_argument("-o", "--out", type=path, required=True, help="file to write, NAME.nern")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--target_bytes", type=count, help="size of the file, in bytes")
    size.add_argument("--bits", type=positive, help=f"bits per weight ({BITS} by default)")
    size.add_argument(
        "--target_drop",
        type=positive,
        help="write the smallest file that loses at most this many points of validation accuracy; runs several fits",
    )
    parser.add_argument("--epochs", type=count, help=f"passes over the training images ({_EPOCHS} by default)")
    parser.add_argument("--out_runs", type=path, default=Path("runs"), help="folder of the fit")
    options, data, fit_args = parser.parse_with_fit_options(args)
    if options.out.suffix != ".nern":
        raise UsageError(f"--out {options.out}: expected a file name that ends in .nern.")
    require_images(data)
    refuse_test_options(fit_args)
    refuse_own_options_and_files(_OWN_OPTIONS, fit_args)
    images = data_module(data)  # refuses options that the test after the fit could not be run with
    require_dataset(images)
    require_writable(options.out.parent, "--out")
    if options.out.exists() and Path(options.net).exists() and options.out.samefile(options.net):
        raise UsageError(f"--out {options.out} is the network itself, which would be replaced; pass another file.")
    network, fit_args = network_options(options.net, options.network, fit_args)
    original = original_of(network)
    images.prepare_data()
    images.check()
    take_class_names(original, images)  # the file will hold them
    _say(f"{options.net} has {int(description(original)['original_bytes']):,} bytes as safetensors")
    kernel_size = quantized_table(original).predictor.kernel_size
    epochs, weights = options.epochs or _EPOCHS, original.fingerprint()
    fits = _Fits(options.out, options.out_runs, epochs, network, weights, kernel_size, [*data, *fit_args])
    if options.target_drop is None:
        fits.save(fits.fit(options.target_bytes, options.bits or BITS))
    else:
        _search(fits, options.target_drop)
    print_sizes(options.out)
    test([str(options.out), *data])


#: Options of a fit that the command sets -> what to do instead.
_OWN_OPTIONS = {
    "--model.rate": "pass --target_bytes or --bits instead",
    "--model.rate.target_bytes": "pass --target_bytes instead",
    "--model.rate.target_bits": "pass --bits instead",
    "--model.representation.quantize.bits": "pass --bits instead",
}


@final
@dataclass(frozen=True)
class _Fits:
    """The fits of a command, each in a folder of its own, which a later call of the same command finds again.

    Attributes:
        out: The file to write.
        runs: Folder of the fits.
        epochs: Epochs of a fit that starts from the network.
        network: The options of the original.
        weights: The fingerprint of its weights.
        kernel_size: That of the table.
        options: Further options of each fit.
    """

    out: Path
    runs: Path
    epochs: int
    network: Mapping[str, str]
    weights: str
    kernel_size: Size
    options: Sequence[str]

    def fit(self, target_bytes: int | None, bits: float, init_from: Path | None = None) -> NernlitCLI:
        """Fit a file of `target_bytes`, or of `bits` per weight, from the network or from an earlier fit."""
        size = f"target_bits={bits:g}" if target_bytes is None else f"target_bytes={target_bytes}"
        epochs = self.epochs if init_from is None else max(1, self.epochs // 2)
        # Shipped configurations use all devices; the user's may name one.
        fit = ["fit", "-c", "compress", "--trainer.devices=1", f"--model.rate.{size}", *epoch_options(epochs)]
        if init_from is None:
            fit += [f"{ORIGINAL}.{name}={value}" for name, value in self.network.items()]
            fit += [f"--model.representation.predictor.kernel_size={json.dumps(self.kernel_size)}"]
        else:
            fit += ["--model.representation=null", f"--model.init_from={init_from}"]
        # The checkpoint has those of the representation.
        fit += self.options if init_from is None else split_options(self.options, "--model.representation")[0]
        try:
            callbacks = [SavedAtEnd("compress"), _Announced(self.out)]
            return continued_fit(fit, self.runs, self.out.stem, self.weights, callbacks)
        except Interrupted as interrupted:
            interrupted.message = f"interrupted; the same command continues it, and {self.out} is written at its end"
            raise

    def save(self, cli: NernlitCLI) -> None:
        """Write the file of a fit, and say so if it is larger than planned."""
        target = cli.model.rate.target_bytes
        cli.model.representation.eval().cpu().save(self.out, **cli.model.save_options)
        size = self.out.stat().st_size
        if size > _TOLERANCE * target:
            _say(f"{self.out} has {size / target - 1:.1%} more bytes than planned: train longer (--epochs)")


@final
class _Announced(Callback):
    """Say at the start of a fit how large its file will be.

    Args:
        out: The file.
    """

    def __init__(self, out: Path) -> None:
        self.out = out

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit" or not isinstance(pl_module, Scheme) or pl_module.rate is None:
            return
        rate, original = pl_module.rate, pl_module.representation.sizes().original_bytes
        if rate.target_bytes is not None:
            size = f"{rate.target_bytes:,} bytes ({rate.target_bytes / original:.1%})"
            _say(f"{self.out} will have {size}: {rate.target_bits:.2f} bits for each of {rate.num_weights:,} weights")


def _search(fits: _Fits, drop: float) -> None:
    """Write the smallest file that loses at most so many points of validation accuracy.

    Starting at the first size, each fit makes the file smaller and continues from the previous fit, until one loses
    more. If already the first one does, the sizes become larger until one does not.

    Raises:
        UsageError: If the largest one still does.
    """
    bits, factor, before = _FIRST_BITS, _DOWN_FACTOR, None
    while _MIN_BITS <= bits <= _MAX_BITS:
        cli = fits.fit(None, bits, init_from=before)
        if "val/acc" not in cli.trainer.callback_metrics:  # the fit was complete already
            cli.trainer.validate(cli.model, cli.datamodule, verbose=False)
        metrics = {name: 100 * float(value) for name, value in cli.trainer.callback_metrics.items()}
        lost = metrics["val/acc_original"] - metrics["val/acc"]
        is_good = lost <= drop
        verdict = "at most" if is_good else "above"
        _say(f"{bits:.2f} bits: {lost:+.2f} points of validation accuracy lost, {verdict} {drop}")
        if is_good:
            fits.save(cli)
            if factor > 1:
                return
            before = Path(str(cli.trainer.log_dir), "checkpoints", "last.ckpt")
        elif before is not None:
            return
        else:
            factor = _UP_FACTOR
        bits *= factor
    if before is None:
        raise UsageError(
            f"--target_drop {drop}: even {bits / factor:.1f} bits per weight lose {lost:.2f} points; allow "
            "a larger drop, or train longer (--epochs)."
        )


def _say(text: str) -> None:
    Console().print(text, soft_wrap=True, highlight=False, markup=False)
