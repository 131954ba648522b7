"""Commands on .nern files: `nernlit export`, `inspect`, `reconstruct`, and `test FILE.nern`."""

from argparse import BooleanOptionalAction
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import lightning as L
import torch
from jsonargparse import ArgumentParser
from rich.console import Console

from nernlit.callbacks import ProgressLine, Summary
from nernlit.callbacks.writer import print_written, write_weights
from nernlit.cli.arguments import CommandParser, count, path, split_options
from nernlit.cli.inputs import require_images
from nernlit.cli.runs import Run, require_dataset
from nernlit.coding import Checks, KeptForm, part_bytes, unreadable
from nernlit.data import ImageDataModule
from nernlit.errors import UsageError
from nernlit.originals import BATCH_NORMS
from nernlit.representation import load, write_onnx
from nernlit.storage.container import Contents, read_container
from nernlit.training import OriginalModule
from nernlit.utilities.progress import CONSOLE
from nernlit.utilities.tables import print_table


def export(args: Sequence[str]) -> None:
    """`nernlit export RUN -o FILE`: write a representation as a .nern file, or its network as an ONNX model."""
    parser = CommandParser("export", export.__doc__)
    parser.add_argument(
        "run", metavar="RUN", help="folder of a fit (runs/<name>/version_N), a checkpoint or .nern file"
    )
    parser.add_argument("-o", "--out", type=path, required=True, help="file to write, NAME.nern or NAME.onnx")
    parser.add_argument("--select", choices=("best", "last"), help="which of a run's checkpoints; best by default")
    parser.add_argument(
        "--image_size",
        type=count,
        help="for .onnx: height and width of the images in pixels; by default those that timm states for the network",
    )
    parser.add_argument(
        "--integers",
        action="store_true",
        help="for .onnx: store predicted weights as int4 or int8, which a quantized Table has",
    )
    parser.add_argument(
        "--kept",
        choices=get_args(KeptForm),
        help="for .nern: how the tensors that are not predicted are stored (default: as the fit's `rate` states; fp32, "
        "exact, without one)",
    )
    parser.add_argument(
        "--fold_batch_norm",
        action=BooleanOptionalAction,
        help="for .nern: move the statistics of BatchNorm layers into their weights and biases (default: as the fit's "
        "`rate` states; no without one)",
    )
    parser.add_original()
    options = parser.parse_args(args)
    if options.out.suffix not in (".nern", ".onnx"):
        raise UsageError(f"--out {options.out}: expected a file name that ends in .nern or .onnx.")
    if options.image_size is not None and options.out.suffix != ".onnx":
        raise UsageError(f"--image_size {options.image_size} is for .onnx files; leave it out.")
    if options.integers and options.out.suffix != ".onnx":
        raise UsageError(
            "--integers is for .onnx files; leave it out. A .nern file of a quantized predictor has integers."
        )
    if options.out.suffix != ".nern" and (options.kept is not None or options.fold_batch_norm is not None):
        given = "--fold_batch_norm" if options.kept is None else f"--kept {options.kept}"
        raise UsageError(f"{given} is for .nern files; leave it out.")
    run = Run.open(options.run, options.select, options.original)
    layers = run.representation().original.net.modules()
    if options.fold_batch_norm and not any(type(layer) in BATCH_NORMS for layer in layers):
        raise UsageError("--fold_batch_norm: the network has no BatchNorm layers; leave it out.")
    if options.out.suffix == ".onnx":
        write_onnx(run.representation(), options.out, options.image_size, options.integers)
        Console().print(
            f"wrote {options.out} ({options.out.stat().st_size:,} bytes)\n"
            "input: pixels in [0, 1]; the model normalizes them",
            soft_wrap=True,
            highlight=False,
            markup=False,
        )
        return
    own = {"kept": options.kept, "fold_batch_norm": options.fold_batch_norm}
    stated = {name: value for name, value in own.items() if value is not None}
    run.representation().save(options.out, **{**run.save_options, **stated})
    print_sizes(options.out)


def inspect(args: Sequence[str]) -> None:
    """`nernlit inspect FILE`: show the contents of a .nern file and the size of each part in bytes."""
    parser = CommandParser("inspect", inspect.__doc__)
    parser.add_argument("file", metavar="FILE", type=path)
    options = parser.parse_args(args)
    contents = read_container(options.file)
    with unreadable(options.file):
        header = contents.header
        specification = header["specification"]
        kept = header["kept"]
        classes, channels = header["num_classes"], header["in_chans"]
        images = "no image classifier" if classes is None else f"{classes} classes, {channels} channels"
        facts = {
            "network": f"{header['network_class']}, {images}",
            "classes": _shortened(header["class_names"]) or "without names",
            "predicted": f"{len(specification['layers'])} layers, order {specification['order']}",
            "predictor": _as_call(specification["predictor"]),
            **_bits(contents),
            "not predicted": f"stored as {kept['form']}, largest relative change {kept['error']:.1e}",
            "weights": f"SHA-256 {Checks.from_tensors(contents.tensors).reconstructed}",
        }
        for name, value in facts.items():
            Console().print(f"{name}: {value}", soft_wrap=True, highlight=False, markup=False)
        print_sizes(options.file)


def _as_call(described: Mapping[str, Any]) -> str:
    """A class and its arguments as Python writes the constructor's call.

    >>> inner = {"class_path": "a.Inner", "init_args": {}}
    >>> _as_call({"class_path": "a.Outer", "init_args": {"inner": inner, "bits": 4}})
    'Outer(inner=Inner(), bits=4)'
    """
    arguments = ", ".join(
        f"{name}={_as_call(value) if isinstance(value, dict) and 'class_path' in value else value}"
        for name, value in described["init_args"].items()
    )
    return f"{described['class_path'].rpartition('.')[2]}({arguments})"


def reconstruct(args: Sequence[str]) -> None:
    """`nernlit reconstruct FILE -o NET.safetensors`: write the network as weights that timm loads."""
    parser = CommandParser("reconstruct", reconstruct.__doc__)
    parser.add_argument("file", metavar="FILE", type=path)
    parser.add_argument("-o", "--out", type=path, required=True, help="file to write, NAME.safetensors")
    options = parser.parse_args(args)
    if options.out.suffix != ".safetensors":
        raise UsageError(f"--out {options.out}: expected a file name that ends in .safetensors.")
    representation = load(options.file)
    write_weights(options.out, representation.original.name, representation.reconstructed())
    print_written(options.out, representation.original)


def test(args: Sequence[str]) -> None:
    """`nernlit test FILE.nern --data CLASS --data.root DIR`: the accuracy of a .nern file's network on test images."""
    parser = ArgumentParser(prog="nernlit test", description=test.__doc__, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("file", metavar="FILE", type=path)
    parser.add_subclass_arguments(ImageDataModule, "data")
    _, data_options = split_options(args, "--data")
    if not {"-h", "--help"} & set(args):
        require_images(data_options)
    given = parser.parse_args(list(args))
    data = parser.instantiate(given).data
    require_dataset(data)
    # OriginalModule has everything that an evaluation needs; its optimizer is not used.
    module = OriginalModule(load(given.file).original, torch.optim.SGD)
    trainer = L.Trainer(
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        callbacks=[Summary(), *([ProgressLine()] if CONSOLE.is_interactive else [])],
    )
    trainer.test(module, datamodule=data, verbose=False)


def print_sizes(file: Path) -> None:
    """Print the bytes of each part of a file, and the ratio of the file to the original's weights."""
    plain: dict[str, Any] = {"soft_wrap": True, "highlight": False, "markup": False}
    contents = read_container(file)
    total, original = file.stat().st_size, int(contents.header["original_bytes"])
    parts = part_bytes(contents)
    parts["header"] = total - sum(parts.values())
    rows = [[name, f"{size:,}", f"{size / total:.1%}"] for name, size in [*parts.items(), ("file", total)]]
    print_table(str(file), ["part", "bytes", "of file"], rows)
    Console().print(
        f"CR of the file {total / original:.1%} (its bytes / {original:,} of the original's safetensors)", **plain
    )
    if "predictor.steps" in contents.tensors:  # quantized: parameters are no measure of size
        return
    predicted = _predicted_weights(contents)
    own = [value for name, value in contents.tensors.items() if name.startswith("predictor.")]
    parameters = sum(value.numel() for value in own if value.is_floating_point())  # codes are integers
    Console().print(f"CR of the paper {parameters / predicted:.1%} (predictor parameters / predicted weights)", **plain)


def _bits(contents: Contents) -> dict[str, str]:
    """The bits of each predicted weight, if the predictor is quantized: training may change the option's."""
    integers = contents.tensors.get("predictor.integers")
    if integers is None:
        return {}
    predicted = _predicted_weights(contents)
    return {"integers": f"{8 * integers.nbytes / predicted:.2f} bits for each of {predicted:,} predicted weights"}


def _shortened(names: Sequence[str], shown: int = 5) -> str:
    """The first names and the last one."""
    return ", ".join([*names[:shown], "...", names[-1]] if len(names) > shown + 1 else names)


def _predicted_weights(contents: Contents) -> int:
    """How many weights a file predicts."""
    return sum(torch.Size(shape).numel() for shape in contents.header["specification"]["layers"].values())
