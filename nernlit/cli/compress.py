"""`nernlit compress`: from a trained network and images to a small file, and its accuracy read back from the file."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from safetensors import SafetensorError, safe_open

from nernlit.cli.arguments import CommandParser, count, positive, require_writable, take_data_options
from nernlit.cli.export import print_sizes, test
from nernlit.cli.main import run
from nernlit.errors import UsageError
from nernlit.originals import Original
from nernlit.training.compression import planned_size, quantized_table

#: Bits per weight without another size.
_BITS = 1.75
_RATE = "--model.rate"
_QUANTIZE = "--model.representation.quantize"


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
    parser.add_argument("--epochs", type=count, help="passes over the training images (30 by default)")
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
    target, bits = planned_size(representation, options.target_bytes, options.bits or _BITS)
    sizes = representation.sizes()
    share, weights = target / sizes.original_bytes, sizes.predicted_weights
    _say(f"{options.net} has {sizes.original_bytes:,} bytes as safetensors")
    _say(f"{options.out} will have {target:,} ({share:.1%}): {bits:.2f} bits for each of {weights:,} weights")
    described = {f"--model.representation.original.{name}": value for name, value in network.items()}
    fit = ["fit", "-c", "compress", *(f"{flag}={value}" for flag, value in described.items())]
    fit += [f"--model.representation.predictor.kernel_size={json.dumps(representation.predictor.kernel_size)}"]
    fit += [f"{_QUANTIZE}.bits={min(bits, 12):.4f}", f"{_RATE}.target_bytes={target}"]
    fit += [] if options.epochs is None else [f"--trainer.max_epochs={options.epochs}"]
    fit += [] if options.epochs is None else [f"--trainer.check_val_every_n_epoch={max(1, options.epochs // 5)}"]
    fit += [*data, *fit_args]
    # Other options are another fit: their hash is part of its folder's name.
    name = f"{options.out.stem}-{hashlib.sha256(repr(fit).encode()).hexdigest()[:8]}"
    logger = "--trainer.logger.init_args"
    fit += [f"{logger}.save_dir={options.out_runs}", f"{logger}.name={name}"]
    if any((options.out_runs / name).glob("version_*/checkpoints/last.ckpt")):
        fit.append("--ckpt_path=last")
    cli = run(fit)
    cli.model.representation.eval().cpu().save(options.out, "fp16", fold_batch_norm=True)
    print_sizes(options.out)
    test([str(options.out), *data])


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
