"""`nernlit report RUN...`: write an HTML report about one or several fits or .nern files.

The page needs no other files and no internet. Accuracies and sizes are measured again, on the test images of the run's
data; curves come from what the run logged for TensorBoard. A .nern file names no data and does not hold the original:
pass `--data CLASS` with its options, and `--original FILE` to compare with the original.
"""

import contextlib
import hashlib
import html
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, final

import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from nernlit.analysis import correct_answers, curves_figure, energy_figure, layer_energies, paired_difference
from nernlit.cli.arguments import CommandParser, path, require_writable, split_options
from nernlit.cli.html_page import document, picture, table
from nernlit.cli.images import OnDevice, add_device, chosen_device
from nernlit.cli.runs import Run, distinct_names
from nernlit.errors import UsageError
from nernlit.representation import Representation
from nernlit.storage.files import write_atomically
from nernlit.utilities.progress import counted, progress

_CURVES = {
    "val/acc": "validation accuracy",
    "val/explained_power": "explained power",
    "train/loss": "training loss",
}


@final
@dataclass(frozen=True)
class _Measured:
    """A run and what was measured of it.

    Attributes:
        name: Its name on the page.
        run: The run.
        representation: Its representation.
        images: SHA-256 of the test images and their labels.
        correct: Which test images the reconstructed network classifies correctly.
        correct_original: Which ones the original does; None if the original is not known.
        scalars: What the run logged: tag -> (step, value).
    """

    name: str
    run: Run
    representation: Representation
    images: str
    correct: Tensor
    correct_original: Tensor | None
    scalars: Mapping[str, Sequence[tuple[int, float]]]

    @classmethod
    def from_run(cls, name: str, run: Run, data: Sequence[str], device: torch.device) -> "_Measured":
        representation = run.representation()
        network = OnDevice(representation.original, device)
        entries = representation.stored_entries(**run.save_options)  # of the file whose size the page states
        networks: list[Callable[[Tensor], Tensor]] = [partial(network, weights=entries)]
        if run.has_original:
            networks.append(network)
        batches = run.batches("test", overrides=data)
        images, correct = hashlib.sha256(), [list[Tensor]() for _ in networks]
        with progress(f"testing {name}", len(batches)) as advance:
            for pixels, labels in counted(batches, advance):
                images.update((255 * pixels).round().byte().numpy().tobytes() + labels.numpy().tobytes())
                for net, found in zip(networks, correct, strict=True):
                    found.append(correct_answers(net, [(pixels, labels)]))
        own, *of_original = map(torch.cat, correct)
        scalars = {} if run.is_file else _scalars(run.folder)
        return cls(name, run, representation, images.hexdigest(), own, next(iter(of_original), None), scalars)


def _scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Every scalar that the run logged: tag -> (step, value), over all of the folder's event files.

    A resumed fit repeats some steps: the later value counts. A damaged file is left out, with a warning.
    """
    found: dict[str, dict[int, float]] = defaultdict(dict)
    for file in sorted(folder.glob("events.out.tfevents.*")):
        events = EventAccumulator(str(file), size_guidance={"scalars": 0})
        with contextlib.suppress(Exception):  # TensorBoard raises nearly anything for files that are not its own
            events.Reload()
        if events.file_version is None and file.stat().st_size:
            print(f"nernlit: {file} holds no events of TensorBoard; its curves are left out.", file=sys.stderr)
        for tag in events.Tags()["scalars"]:
            values = {event.step: event.value for event in events.Scalars(tag)}
            found[tag] |= {step: value for step, value in values.items() if math.isfinite(value)}
    return {tag: sorted(values.items()) for tag, values in found.items() if values}


def page(runs: Sequence[Run], data: Sequence[str] = (), device: torch.device | None = None) -> str:
    """The HTML of a report.

    Args:
        runs: At least one; the first is what later ones are compared with.
        data: Overrides of the runs' data configuration (`--data.root DIR`).
        device: Where the networks classify; torch's accelerator by default, if there is one.
    """
    names, device = distinct_names(runs), chosen_device(device)
    measured = [_Measured.from_run(name, run, data, device) for name, run in zip(names, runs, strict=True)]
    first, *others = measured
    comparable = [m for m in others if m.images == first.images]
    not_comparable = [m for m in others if m not in comparable]
    parts = [
        "<h2>Accuracy and size</h2>",
        table([_accuracy_row(m) for m in measured]),
        "<p class=note>Differences are paired, on the same test images: 95% interval, exact McNemar test.</p>",
    ]
    if comparable:
        parts += [f"<h2>Against {_name(first)}</h2>", table([_against(m, first) for m in comparable])]
    if not_comparable:
        parts.append(f"<p class=note>Tested on other images: {', '.join(map(_name, not_comparable))}.</p>")
    conditions = [row for m in measured for row in _conditions(m)]
    if conditions:
        eval_sets = {row["condition"] for row in conditions}
        short = [row for row in conditions if not any(row["condition"].startswith(f"{name}_") for name in eval_sets)]
        parts += ["<h2>Other distributions and attacks</h2>", table(short)]
        parts.append("<p class=note>As the run's last <code>test</code> of this checkpoint measured them.</p>")
        parts.append(f"<details><summary>every condition</summary>{table(conditions)}</details>")
    parts.append("<h2>Curves</h2>")
    if without := [_name(m) for m in measured if not any(m.scalars.get(tag) for tag in _CURVES)]:
        parts.append(f"<p class=note>No curves were logged by {', '.join(without)}.</p>")
    for tag, title in _CURVES.items():
        lines = {m.name: m.scalars[tag] for m in measured if m.scalars.get(tag)}
        if lines:
            parts.append(picture(curves_figure(lines, title), title))
    for m in measured:
        parts.append(f"<h2>{_name(m)}</h2>")
        if m.run.has_original:
            energies = energy_figure({m.name: layer_energies(m.representation)})
            parts.append(picture(energies, f"low-frequency energy of {m.name}"))
        else:
            parts.append(
                "<p class=note>No comparison with the original: pass its weights (<code>--original FILE</code>).</p>"
            )
        title = "specification" if m.run.is_file else "configuration"
        described = yaml.safe_dump(m.representation.specification() if m.run.is_file else m.run.config)
        parts += [
            f"<p>{html.escape(str(m.run.checkpoint))}</p>",
            f"<details><summary>{title}</summary><pre>{html.escape(described)}</pre></details>",
        ]
    return document("nernlit report", parts)


def _name(measured: _Measured) -> str:
    return html.escape(measured.name)


def _accuracy_row(m: _Measured) -> dict[str, Any]:
    sizes = m.run.sizes()
    return {
        "run": m.name,
        "original %": math.nan if m.correct_original is None else 100 * float(m.correct_original.float().mean()),
        "reconstructed %": 100 * float(m.correct.float().mean()),
        **_difference(m.correct, m.correct_original),
        "test images": len(m.correct),
        "CR (paper) %": 100 * sizes.cr_paper,
        "CR (.nern file) %": 100 * sizes.cr_file,
        "predictor's parameters": sizes.predictor_params,
    }


def _against(m: _Measured, first: _Measured) -> dict[str, Any]:
    return {"run": m.name, **_difference(m.correct, first.correct)}


def _difference(correct: Tensor, reference: Tensor | None) -> dict[str, Any]:
    if reference is None:
        return dict.fromkeys(("difference", "from", "to", "p"), math.nan)
    paired = paired_difference(correct, reference)
    return {
        "difference": 100 * paired.difference,
        "from": 100 * paired.low,
        "to": 100 * paired.high,
        "p": paired.p_value,
    }


def _conditions(m: _Measured) -> list[dict[str, Any]]:
    """The accuracies of the run's checkpoint on further test sets and their conditions, and under attacks."""
    rows = []
    for tag, logged in m.scalars.items():
        values = dict(logged)
        name = tag.removeprefix("test/acc_")
        if name == tag or tag.endswith("_original") or name == "top5":
            continue
        if m.run.step not in values:
            continue  # measured on another checkpoint
        original = dict(m.scalars.get(f"{tag}_original", []))
        rows.append(
            {
                "run": m.name,
                "condition": name,
                "reconstructed %": 100 * values[m.run.step],
                "original %": 100 * original.get(m.run.step, math.nan),
            }
        )
    return rows


def main(args: Sequence[str]) -> None:
    """Run the command with these arguments; `--data...` ones change the runs' own data configuration."""
    parser = CommandParser("report", __doc__)
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="folder of a fit (runs/<name>/version_N), a checkpoint or a .nern file"
    )
    parser.add_argument("--select", choices=("best", "last"), help="which of a run's checkpoints (default: best)")
    parser.add_argument("--out", type=path, default=Path("report.html"), help="file to write")
    add_device(parser)
    parser.add_original()
    own_args, data = split_options(args, "--data")
    options = parser.parse_args(own_args)
    if options.out.is_dir():
        raise UsageError(f"--out {options.out} is a folder; expected a file, such as {options.out / 'report.html'}.")
    require_writable(options.out.parent, "--out")
    runs = [Run.open(path, options.select, options.original) for path in options.runs]
    content = page(runs, data, options.device)
    write_atomically(options.out, content.encode())
    print(f"report: {options.out}")
