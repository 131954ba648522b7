"""`nernlit compare`: compress one network by several methods, and compare accuracies and bytes of the files."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import final

from torch import Tensor

from nernlit.analysis import correct_answers, paired_difference
from nernlit.cli.arguments import CommandParser, count, path, positive, require_writable
from nernlit.cli.compare_table import COLUMNS, print_rows, require_same, rows_figure, with_row
from nernlit.cli.configs import config_fingerprint, config_parts, expand_bases
from nernlit.cli.fits import SavedAtEnd, continued_fit, epoch_options
from nernlit.cli.inputs import (
    network_options,
    original_of,
    refuse_own_options_and_files,
    refuse_test_options,
    require_images,
)
from nernlit.cli.main import ERROR
from nernlit.cli.other_files import OtherFile, read_other_files
from nernlit.cli.rivals import SETTINGS, TRAINED, WITH_BITS, Rivals, rival_name, write
from nernlit.cli.runs import data_module, require_dataset
from nernlit.cli.sweep_fit import fit_timer
from nernlit.cli.sweep_run import described, is_unknown_option
from nernlit.cli.sweep_table import Row, read_rows
from nernlit.data import ImageDataModule
from nernlit.errors import NernlitError, UsageError
from nernlit.originals import Original, description
from nernlit.storage.files import write_atomically, write_figure, write_table
from nernlit.training import take_class_names
from nernlit.utilities.signals import Interrupted


def compare(args: Sequence[str]) -> None:
    """`nernlit compare NET --data CLASS --data.root DIR --out DIR`: compress a network by several methods.

    Each method writes files, and the accuracy on the test images is that of the networks in the files. Without
    training: `fp16`, `svd` (truncated singular values, in fp16), `prune` (the smallest weights become 0), `round`
    (integer multiples of one step size per filter). Trained by distillation from the network itself: `round_distill`
    (as `round`), `table` (as `nernlit compress`: the size of the file is in the loss), `codebooks` (sums of codewords).
    Integers in .nern files are entropy-coded. To continue after an interruption, run the same command again.

    `--others` adds files of other programs, with the same test: a CSV with the columns `method`, `setting` (a number),
    `file` (the compressed file) and `weights` (the weights that the other program decoded from it).
    """
    options, data_options, fit_options = _parser().parse_with_fit_options(args)
    network, fit_options = network_options(options.net, options.network, fit_options)
    refuse_test_options(fit_options)
    trains = not set(TRAINED).isdisjoint(options.methods)
    for_fits = fit_options if options.epochs is None else [f"--epochs {options.epochs}", *fit_options]
    if for_fits and not trains:
        raise UsageError(f"{for_fits[0]} is for methods that train ({', '.join(TRAINED)}); leave it out.")
    if options.epochs is not None:
        fit_options += epoch_options(options.epochs)
    if options.bits and set(WITH_BITS).isdisjoint(options.methods):
        raise UsageError(f"--bits is for {', '.join(WITH_BITS)}; leave it out.")
    require_images(data_options)
    require_writable(options.out, "--out")
    others = read_other_files(options.others) if options.others else []
    original = original_of(network)
    rivals = Rivals(original, network)
    refuse_own_options_and_files(dict.fromkeys(rivals.own_options(options.methods), "leave it out"), fit_options)
    data = _test_data(data_options, original)
    # The weights, and how images are normalized.
    others_of = [f"{key}={value}" for key, value in network.items() if key not in ("name", "checkpoint", "pretrained")]
    own = {"original": " ".join([original.fingerprint()[:12], *others_of]), "data": " ".join(data_options)}
    # A configuration may have another content under its name.
    contents = [f"contents={config_fingerprint(fit_options)}"] if config_parts(expand_bases(fit_options)) else []
    asked = " ".join([*fit_options, *contents])
    keys = {method: {**own, "options": asked if method in TRAINED else ""} for method in SETTINGS}
    table = options.out / "compare.csv"
    rows = read_rows(table, COLUMNS)
    for row in rows:
        require_same(row, keys[str(row["method"])] if trains and row["method"] in TRAINED else own, table)
    waiting = _waiting(options, rows, table)
    comparison = _Comparison(rivals, data, options.out, [*data_options, *fit_options])
    for other in others:
        of_other: Row = {"method": other.method, "setting": other.setting, **own, "options": ""}
        row = {**of_other, **comparison.measure_other(other)}
        rows = with_row(read_rows(table, COLUMNS), row)  # another command may have added rows meanwhile
        write_table(table, rows)
    failed: dict[str, str] = {}
    for number, (method, setting) in enumerate(waiting, 1):
        name = rival_name(method, setting)
        print(f"{number} of {len(waiting)}: {name}", flush=True)
        try:
            row = {"method": method, "setting": setting, **keys[method], **comparison.measure(method, setting)}
        except Interrupted as interrupted:
            interrupted.message = f"interrupted in {name}; the same command continues it, and finished files are kept"
            raise
        except Exception as error:
            if is_unknown_option(error):
                raise
            failed[name] = described(error)
            print(f"{ERROR}{name}: {failed[name]}", file=sys.stderr, flush=True)
            continue
        # Another command may have added rows meanwhile.
        rows = with_row(read_rows(table, COLUMNS), row)
        write_table(table, rows)
    if rows:
        print_rows(rows)
        write_figure(options.out / "compare.png", rows_figure(rows, options.net))
        print(f"table: {table}\nfigure: {options.out / 'compare.png'}")
    if failed:
        raise NernlitError(f"{len(failed)} files were not written; the same command tries only those again.")


def _parser() -> CommandParser:
    parser = CommandParser("compare", compare.__doc__, "All other options are those of `nernlit fit`.")
    parser.add_network()
    parser.add_argument("--out", type=path, required=True, help="folder of files, fits, table and figure")
    parser.add_argument("--methods", nargs="+", choices=SETTINGS, default=list(SETTINGS), help="default: all")
    parser.add_argument("--bits", type=positive, nargs="+", help=f"bits per weight of {', '.join(WITH_BITS)}")
    parser.add_argument("--others", type=path, metavar="FILE.csv", help="table of files of other programs")
    parser.add_argument("--epochs", type=count, help="passes of each fit over the training images (30 by default)")
    return parser


def _waiting(options: argparse.Namespace, rows: Sequence[Row], table: Path) -> list[tuple[str, float]]:
    """The methods and settings that were asked for and whose files are not in the table yet."""
    wanted = [
        (method, setting)
        for method in options.methods
        for setting in (options.bits if options.bits and method in WITH_BITS else SETTINGS[method])
    ]
    done = {(row["method"], float(row["setting"])) for row in rows if (options.out / str(row["file"])).is_file()}
    waiting = [each for each in dict.fromkeys(wanted) if each not in done]
    if len(waiting) < len(wanted):
        print(f"{len(wanted) - len(waiting)} of {len(wanted)} files are in {table} already", flush=True)
    return waiting


@final
class _Comparison:
    """Compresses a network by one method after the other, and measures the files.

    Args:
        rivals: The methods.
        data: The test images.
        out: Folder of files and fits.
        fit_options: Further options of each fit.
    """

    def __init__(self, rivals: Rivals, data: ImageDataModule, out: Path, fit_options: Sequence[str]) -> None:
        self.rivals, self.data, self.out, self.fit_options = rivals, data, out, fit_options
        self.original_bytes = int(description(rivals.original)["original_bytes"])

    def measure(self, method: str, setting: float) -> Row:
        """Write a file, and measure it."""
        name, seconds = rival_name(method, setting, "_"), 0.0
        if method in TRAINED:
            fit = [*self.rivals.fit_options(method, setting), *self.fit_options]
            weights = self.rivals.original.fingerprint()
            cli = continued_fit(fit, self.out / "fits", name, weights, [SavedAtEnd("compare")])
            network, seconds = cli.model.representation, fit_timer(cli.trainer).time_elapsed("train")
        else:
            network = self.rivals.untrained(method, setting)
        file = write(network, self.out, name)
        return self._row(file, self.rivals.read(file), seconds)

    def measure_other(self, other: OtherFile) -> Row:
        """Copy the file of another program, and measure it.

        Raises:
            CheckpointError: If the weights that were decoded from it do not fit the network.
        """
        file = self.out / f"{other.stem}{other.file.suffix}"
        network = self.rivals.with_weights(other.weights)
        write_atomically(file, other.file.read_bytes())
        return self._row(file, network, 0.0)

    def _row(self, file: Path, network: Original, seconds: float) -> Row:
        correct = correct_answers(network, self._batches())
        difference = paired_difference(correct, self._reference)
        return {
            "file": file.name,
            "bytes": file.stat().st_size,
            "original_bytes": self.original_bytes,
            "acc_original": float(self._reference.double().mean()),
            "acc": float(correct.double().mean()),
            "difference": difference.difference,
            "difference_low": difference.low,
            "difference_high": difference.high,
            "p_value": difference.p_value,
            "fit_seconds": seconds,
        }

    @cached_property
    def _reference(self) -> Tensor:
        return correct_answers(self.rivals.original, self._batches())

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in self.data.test_dataloader()[0]:
            yield self.data.on_after_batch_transfer(batch, 0)


def _test_data(options: Sequence[str], original: Original) -> ImageDataModule:
    """The data, ready for test batches.

    Raises:
        UsageError: If it has no images.
    """
    data = data_module(options)
    require_dataset(data)
    if data.eval_sets:
        raise UsageError("--data.eval_sets: the rows are of the dataset's own test images; leave it out.")
    data.network = original
    data.prepare_data()
    data.setup("test")
    take_class_names(original, data)
    return data
