"""`nernlit report RUN...`: one HTML page about one fit, or several side by side; it needs no network.

Every figure is measured anew on the run's test images, or read from what the run logged (TensorBoard's files).
"""

import base64
import contextlib
import hashlib
import html
import io
import json
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, final

import torch
import yaml
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from nernlit.analysis import correct_answers, curves_figure, energy_figure, layer_energies, paired_difference
from nernlit.cli.arguments import CommandParser, require_writable, take_data_options
from nernlit.cli.runs import Batches, Run, distinct_names
from nernlit.errors import UsageError
from nernlit.representation import Representation
from nernlit.storage.files import write_atomically
from nernlit.utilities.progress import progress

_CURVES = {
    "val/acc": "validation accuracy",
    "val/explained_power": "explained power",
    "train/loss": "training loss",
}

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem;color:#222}
h1{font-size:1.6rem}h2{font-size:1.2rem;margin-top:2.2rem;border-bottom:1px solid #ccc}
table{border-collapse:collapse;margin:.8rem 0}th,td{padding:.25rem .7rem;border-bottom:1px solid #ddd;text-align:right}
th:first-child,td:first-child{text-align:left}th{cursor:pointer;background:#f4f4f4}th:hover{background:#e4e4e4}
img{max-width:100%}pre{background:#f7f7f7;padding:.8rem;overflow-x:auto;font-size:12px}p.note{color:#666}
"""

#: A click on a column's head sorts by it: numbers by their value, which cells carry in data-v, the rest as text.
_SCRIPT = """
for(const head of document.querySelectorAll('th'))head.onclick=()=>{
 const table=head.closest('table'),column=[...head.parentNode.children].indexOf(head),up=head.dataset.up!=='1';
 const value=row=>{const cell=row.children[column];return cell.dataset.v===undefined?cell.textContent:+cell.dataset.v};
 const rows=[...table.tBodies[0].rows].sort((a,b)=>{const x=value(a),y=value(b);return(x>y)-(x<y)});
 if(!up)rows.reverse();
 for(const other of head.parentNode.children)delete other.dataset.up;
 head.dataset.up=up?'1':'0';table.tBodies[0].append(...rows)};
"""


@final
@dataclass(frozen=True)
class _Measured:
    """A run, and what the page says about it."""

    name: str
    run: Run
    representation: Representation
    images: str  # a hash of the test images and their labels
    correct: Tensor
    correct_original: Tensor
    scalars: Mapping[str, Sequence[tuple[int, float]]]

    @classmethod
    def of(cls, name: str, run: Run, data: Sequence[str]) -> "_Measured":
        representation = run.representation()
        with torch.no_grad():
            reconstructed = partial(representation, weights=representation.weights())
        batches = run.batches("test", overrides=data)
        images = hashlib.sha256()
        for pixels, labels in batches:
            images.update(pixels.numpy().tobytes() + labels.numpy().tobytes())
        networks: tuple[Callable[[Tensor], Tensor], ...] = reconstructed, representation.original
        with progress(f"testing {name}", 2 * len(batches)) as advance:
            correct, correct_original = (correct_answers(net, _counted(batches, advance)) for net in networks)
        return cls(name, run, representation, images.hexdigest(), correct, correct_original, _scalars(run.folder))


def _counted(batches: Batches, advance: Callable[[int], None]) -> Iterator[tuple[Tensor, Tensor]]:
    for batch in batches:
        yield batch
        advance(1)


def _scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Every scalar that the run logged: tag -> (step, value), over all of the folder's event files.

    A resumed fit makes some steps twice: the later value counts. A damaged file is named and left out.
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


def page(runs: Sequence[Run], data: Sequence[str] = ()) -> str:
    """The HTML of a report.

    Args:
        runs: At least one; the first is what later ones are compared with.
        data: Overrides of the runs' data configuration (`--data.root DIR`).
    """
    measured = [_Measured.of(name, run, data) for name, run in zip(distinct_names(runs), runs, strict=True)]
    first, *others = measured
    comparable = [m for m in others if m.images == first.images]
    apart = [m for m in others if m not in comparable]
    parts = [
        "<h2>Accuracy and size</h2>",
        _table([_accuracy_row(m) for m in measured]),
        "<p class=note>Differences are paired, on the same test images: 95% interval, exact McNemar test.</p>",
    ]
    if comparable:
        parts += [f"<h2>Against {_name(first)}</h2>", _table([_against(m, first) for m in comparable])]
    if apart:
        parts.append(f"<p class=note>Tested on other images: {', '.join(map(_name, apart))}.</p>")
    conditions = [row for m in measured for row in _conditions(m)]
    if conditions:
        eval_sets = {row["condition"] for row in conditions}
        short = [row for row in conditions if not any(row["condition"].startswith(f"{name}_") for name in eval_sets)]
        parts += ["<h2>Other distributions and attacks</h2>", _table(short)]
        parts.append("<p class=note>As the run's last <code>test</code> measured them.</p>")
        parts.append(f"<details><summary>every condition</summary>{_table(conditions)}</details>")
    parts.append("<h2>Curves</h2>")
    if without := [_name(m) for m in measured if not any(m.scalars.get(tag) for tag in _CURVES)]:
        parts.append(f"<p class=note>No curves were logged by {', '.join(without)}.</p>")
    for tag, title in _CURVES.items():
        lines = {m.name: m.scalars[tag] for m in measured if m.scalars.get(tag)}
        if lines:
            parts.append(_picture(curves_figure(lines, title), title))
    for m in measured:
        parts += [
            f"<h2>{_name(m)}</h2>",
            _picture(energy_figure({m.name: layer_energies(m.representation)}), f"low-frequency energy of {m.name}"),
            f"<p>{html.escape(str(m.run.checkpoint))}</p>",
            f"<details><summary>configuration</summary><pre>{html.escape(yaml.safe_dump(m.run.config))}</pre></details>",
        ]
    head = f'<meta charset="utf-8"><title>nernlit report</title><style>{_STYLE}</style>'
    body = "\n".join(["<h1>nernlit report</h1>", *parts, f"<script>{_SCRIPT}</script>"])
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{body}</body></html>\n'


def _name(measured: _Measured) -> str:
    return html.escape(measured.name)


def _accuracy_row(m: _Measured) -> dict[str, Any]:
    sizes = m.representation.sizes()
    return {
        "run": m.name,
        "original %": 100 * float(m.correct_original.float().mean()),
        "reconstructed %": 100 * float(m.correct.float().mean()),
        **_difference(m.correct, m.correct_original),
        "test images": len(m.correct),
        "CR (paper) %": 100 * sizes.cr_paper,
        "CR (.nern file) %": 100 * sizes.cr_file,
        "predictor's parameters": sizes.predictor_params,
    }


def _against(m: _Measured, first: _Measured) -> dict[str, Any]:
    return {"run": m.name, **_difference(m.correct, first.correct)}


def _difference(correct: Tensor, reference: Tensor) -> dict[str, Any]:
    paired = paired_difference(correct, reference)
    return {
        "difference": 100 * paired.difference,
        "from": 100 * paired.low,
        "to": 100 * paired.high,
        "p": paired.p_value,
    }


def _conditions(m: _Measured) -> list[dict[str, Any]]:
    """The last logged accuracy of every further test set, its conditions, and every attack."""
    rows = []
    for tag, values in m.scalars.items():
        name = tag.removeprefix("test/acc_")
        if name == tag or tag.endswith("_original") or name == "top5" or name.startswith("top5_") or name == "original":
            continue
        original = m.scalars.get(f"{tag}_original")
        rows.append(
            {
                "run": m.name,
                "condition": name,
                "reconstructed %": 100 * values[-1][1],
                "original %": 100 * original[-1][1] if original else float("nan"),
            }
        )
    return rows


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    head = "".join(f"<th>{html.escape(column)}</th>" for column in rows[0])
    lines = ("".join(_cell(value) for value in row.values()) for row in rows)
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _cell(value: Any) -> str:
    if isinstance(value, str):
        return f"<td>{html.escape(value)}</td>"
    if not math.isfinite(value):
        return "<td data-v=-1e999>-</td>"
    shown = f"{value:,}" if isinstance(value, int) else f"{value:.3g}" if abs(value) < 0.1 else f"{value:.2f}"
    return f"<td data-v={json.dumps(value)}>{shown}</td>"


def _picture(figure: Figure, description: str) -> str:
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110)
    encoded = base64.b64encode(content.getvalue()).decode()
    return f'<p><img alt="{html.escape(description)}" src="data:image/png;base64,{encoded}"></p>'


def main(args: Sequence[str]) -> None:
    """Run the command with these arguments; `--data...` ones change the runs' own data configuration."""
    parser = CommandParser("report", __doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a fit's folder (runs/<name>/version_N) or a checkpoint")
    parser.add_argument("--select", choices=("best", "last"), help="which of a run's checkpoints (default: best)")
    parser.add_argument("--out", type=Path, default=Path("report.html"), help="the file")
    parser.add_argument("--original", type=Path, help="the original's weights, where their file has moved")
    own_args, data = take_data_options(args)
    options = parser.parse_args(own_args)
    if options.out.is_dir():
        raise UsageError(f"--out {options.out} is a folder; expected a file, such as {options.out / 'report.html'}.")
    require_writable(options.out.parent, "--out")
    content = page([Run.open(path, options.select, options.original) for path in options.runs], data)
    write_atomically(options.out, content.encode())
    print(f"report: {options.out}")
