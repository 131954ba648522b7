"""`nernlit compress`: from a trained network and images to a small file, and its accuracy read back from the file."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

from rich.console import Console
from safetensors import SafetensorError, safe_open

from nernlit.cli.arguments import CommandParser, count, positive, require_writable, take_data_options
from nernlit.cli.export import print_sizes, test
from nernlit.cli.fits import continued_fit
from nernlit.cli.main import NernlitCLI
from nernlit.errors import UsageError
from nernlit.originals import Original
from nernlit.representation import Representation
from nernlit.training.compression import planned_size, quantized_table

#: Bits per weight without another size.
_BITS = 1.75
_EPOCHS = 30
#: Bits per weight in a search for the smallest file: the first, what they are multiplied by, and their limits.
_FIRST_BITS, _SMALLER, _LARGER, _LEAST_BITS, _MOST_BITS = 2.0, 0.8, 1.5, 0.3, 8.0


def compress(args: Sequence[str]) -> None:
    """`nernlit compress NET -o FILE --data CLASS --data.root DIR`: store a trained network as a small .nern file.

    The weights are rounded to learned step sizes, and trained on the network's own answers to the images, with the size
    of the file in the loss. The same command continues an interrupted one. Example, for a folder with
    `train/<class>/<image>` and `test/`:

        nernlit compress resnet18.safetensors --network resnet18 -o small.nern --data FolderDataModule --data.root DIR
    """
    parser = CommandParser("compress", compress.__doc__, "All other options are those of `nernlit fit`.")
    parser.add_argument(
        "net", metavar="NET", help="file of the network's weights, or a timm model with pretrained ones"
    )
    parser.add_argument("-o", "--out", type=Path, required=True, help="file to write, NAME.nern")
    parser.add_argument("--network", help="timm name of the network, for a file of weights that does not say it")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--target_bytes", type=count, help="size of the file, in bytes")
    size.add_argument("--bits", type=positive, help=f"bits per weight ({_BITS} by default)")
    size.add_argument(
        "--target_drop",
        type=positive,
        help="write the smallest file that loses at most so many points of validation accuracy; takes several fits",
    )
    parser.add_argument("--epochs", type=count, help=f"passes over the training images ({_EPOCHS} by default)")
    parser.add_argument("--out_runs", type=Path, default=Path("runs"), help="folder of the fit")
    others, data = take_data_options(args)
    options, fit_args = parser.parse_known_args(others)
    if options.out.suffix != ".nern":
        raise UsageError(f"--out {options.out}: expected a file name that ends in .nern.")
    if not data:
        raise UsageError(
            "images are needed: --data FolderDataModule --data.root DIR for a folder with train/<class>/<image>, or "
            "the DataModule of a dataset, such as CIFAR10DataModule."
        )
    require_writable(options.out.parent, "--out")
    network = network_options(options.net, options.network)
    original = Original(network["name"], network.get("checkpoint"), pretrained="pretrained" in network)
    representation = quantized_table(original)
    sizes = representation.sizes()
    _say(f"{options.net} has {sizes.original_bytes:,} bytes as safetensors")
    fits = _Fits(options.out, options.out_runs, options.epochs or _EPOCHS, network, representation, [*data, *fit_args])
    if options.target_drop is None:
        fits.save(fits.fit(*planned_size(representation, options.target_bytes, options.bits or _BITS)))
    else:
        _search(fits, options.target_drop)
    print_sizes(options.out)
    test([str(options.out), *data])


@final
@dataclass(frozen=True)
class _Fits:
    """The fits of a command, each in a folder of its own, which a later call of the same command finds again.

    Attributes:
        out: The file to write.
        runs: Folder of the fits.
        epochs: Epochs of a fit that starts from the network.
        network: The options of the original.
        representation: What is trained, not trained yet.
        options: Further options of each fit.
    """

    out: Path
    runs: Path
    epochs: int
    network: Mapping[str, str]
    representation: Representation
    options: Sequence[str]

    def fit(self, target: int, bits: float, init_from: Path | None = None) -> NernlitCLI:
        """Fit a file of `target` bytes, that is of `bits` per weight, from the network or from an earlier fit."""
        sizes = self.representation.sizes()
        share, weights = target / sizes.original_bytes, sizes.predicted_weights
        _say(f"{self.out} will have {target:,} bytes ({share:.1%}): {bits:.2f} bits for each of {weights:,} weights")
        epochs = self.epochs if init_from is None else max(1, self.epochs // 2)
        fit = ["fit", "-c", "compress", f"--model.rate.target_bytes={target}", f"--trainer.max_epochs={epochs}"]
        fit += [f"--trainer.check_val_every_n_epoch={max(1, epochs // 5)}"]
        if init_from is None:
            start = "--model.representation"
            fit += [f"{start}.original.{name}={value}" for name, value in self.network.items()]
            fit += [f"{start}.predictor.kernel_size={json.dumps(self.representation.predictor.kernel_size)}"]
        else:
            fit += ["--model.representation=null", f"--model.init_from={init_from}"]
        fit += self.options
        return continued_fit(fit, self.runs, self.out.stem)

    def save(self, cli: NernlitCLI) -> None:
        """Write the file of a fit."""
        cli.model.representation.eval().cpu().save(self.out, "fp16", fold_batch_norm=True)


def _search(fits: _Fits, drop: float) -> None:
    """Write the smallest file that loses at most so many points of validation accuracy.

    From the first size, sizes become smaller, each fit going on from the one before it, until one loses more. If the
    first one does already, sizes become larger until one does not.

    Raises:
        UsageError: If the largest one still does.
    """
    bits, factor, before = _FIRST_BITS, _SMALLER, None
    while _LEAST_BITS <= bits <= _MOST_BITS:
        cli = fits.fit(*planned_size(fits.representation, None, bits), init_from=before)
        cli.trainer.validate(cli.model, cli.datamodule, verbose=False)  # a fit that was complete has no metrics
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
            factor = _LARGER
        bits *= factor
    if before is None:
        raise UsageError(
            f"--target_drop {drop}: at {bits / factor:.1f} bits per weight {lost:.2f} points are lost still; allow "
            "more, or train longer (--epochs)."
        )


def network_options(net: str, name: str | None) -> dict[str, str]:
    """The options of `Original` for a file of weights or the name of a timm model.

    Args:
        net: The file or the name.
        name: timm name of the network, for a file that does not say it.

    Raises:
        UsageError: If the architecture of a file's weights is not known.
    """
    path = Path(net)
    if not path.exists():
        if path.suffix in (".safetensors", ".pt", ".pth", ".th", ".ckpt", ".nern"):
            raise UsageError(f"no file at {net}; expected a file of weights, or the name of a timm model.")
        return {"name": net, "pretrained": "true"}
    name = name or _stated_name(path)
    if name is None:
        raise UsageError(f"{net} does not say which network its weights are of; pass --network NAME (timm's name).")
    return {"name": name, "checkpoint": net}


def _stated_name(path: Path) -> str | None:
    """The timm name in the metadata of a safetensors file."""
    try:
        with safe_open(path, "pt") as file:
            return (file.metadata() or {}).get("timm_name")
    except (SafetensorError, OSError):
        return None


def _say(text: str) -> None:
    Console().print(text, soft_wrap=True, highlight=False, markup=False)
