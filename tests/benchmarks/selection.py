"""The gain at CR > 1 that is due to selection alone.

Run `python -m tests.benchmarks.selection --original NAME=FILE --images DIR`.

A round has several trials, each of them several evaluations of a network close to the round's target; the best of all
is the next round's target. The networks are those of a Recon-only fit in the second half of its steps (`--kind fits`),
or the target plus noise with the size and the spectrum of such a fit's error (`--kind noise`). The best is selected on
the test images (`test`, as the paper's code does), on the validation images (`val`), or on every second test image
(`half`); in the last case the others measure the gain without bias. A line of `selection.jsonl` is one round; rounds
that the file has already are not run again.

Images with a large margin between the original's two largest logits are not classified again: small changes of the
weights do not change the answer. `--check` measures how many answers would have changed.
"""

import argparse
import copy
import json
import statistics
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from nernlit.analysis import noise_like
from nernlit.cli.runs import Run
from nernlit.kernels import Uniform
from nernlit.losses import reconstruction_mse
from nernlit.optimizers import WarmupCosine
from nernlit.originals import Original
from nernlit.predictors import MLP
from nernlit.representation import Representation
from tests.benchmarks.study_images import Measured, logits
from tests.benchmarks.study_settings import Setting, build_optimizer

Weights = dict[str, Tensor]


class Judge:
    """Counts correct answers: on all test images, on every second one, on the others, and on the validation images.

    Args:
        representation: One of the original.
        measured: The images.
        margin: Images with a larger margin keep the original's answer.
        device: Where images are classified.
    """

    def __init__(self, representation: Representation, measured: Measured, margin: float, device: str) -> None:
        self.representation, self.splits = copy.deepcopy(representation).to(device), measured.splits
        self.close = {name: _margins(split.original) < margin for name, split in self.splits.items()}

    def counts(self, weights: Weights) -> dict[str, int]:
        correct = {name: self._answers(name, weights) == split.labels for name, split in self.splits.items()}
        parts = {**correct, "half": correct["test"][::2], "rest": correct["test"][1::2]}
        return {name: int(correct_N.sum()) for name, correct_N in parts.items()}

    def _answers(self, name: str, weights: Weights) -> Tensor:
        split, close_N = self.splits[name], self.close[name]
        answers_N = split.original.argmax(1)
        answers_N[close_N] = logits(self.representation, weights, split.pixels[close_N]).argmax(1)
        return answers_N

    def largest_margin(self, weights: Weights) -> tuple[int, float]:
        """The number of test images whose answer changes, and the largest margin of such an image."""
        split = self.splits["test"]
        answers_N = logits(self.representation, weights, split.pixels).argmax(1)
        changed_N = answers_N != split.original.argmax(1)
        return int(changed_N.sum()), float(_margins(split.original)[changed_N].max())


def _margins(logits_NC: Tensor) -> Tensor:
    """The difference of the two largest logits of each image."""
    largest_N2 = logits_NC.topk(2, dim=1).values
    return largest_N2[:, 0] - largest_N2[:, 1]


def fitted(original: Original, target: Weights, options: argparse.Namespace, seed: int) -> Iterator[Weights]:
    """Weights that a Recon-only fit to the target reconstructs, at equal distances in the second half of its steps."""
    torch.manual_seed(seed)
    mlp = MLP(options.hidden, activation="gelu", num_frequencies=options.num_frequencies, base=options.base)
    whole = Representation(copy.deepcopy(original), mlp, order=options.order).to(options.device)
    target_NKK = whole.layout.table(target, mlp.block).to(options.device) / whole.scale
    optimizer = build_optimizer(Setting(), mlp.parameters())
    schedule = WarmupCosine(optimizer, 50, total_steps=options.steps)
    norms, half = target_NKK.flatten(1).norm(dim=1).cpu(), options.steps // 2
    at = {options.steps - half * number // options.evaluations for number in range(options.evaluations)}
    for step in range(1, options.steps + 1):
        rows = Uniform(4096).indices(norms, seed, step).to(options.device)
        with torch.autocast(options.device, torch.bfloat16):
            predicted = whole.kernels(rows)
        optimizer.zero_grad()
        reconstruction_mse(predicted / whole.scale, target_NKK[rows], whole.learned.mask(rows)).backward()
        optimizer.step()
        schedule.step()
        if step in at:
            with torch.no_grad():
                yield {key: value.to("cpu", copy=True) for key, value in whole.weights().items()}


def noisy(target: Weights, error: Weights, evaluations: int, seed: int) -> Iterator[Weights]:
    """The target plus independent noise with the spectrum of the error."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(evaluations):
        noise = noise_like(error, generator)
        yield {key: value + noise[key] for key, value in target.items()}


def error_of(original: Original, target: Weights, options: argparse.Namespace) -> Weights:
    """The error of a Recon-only fit: that of the given run, or of an own fit; scaled to the given size."""
    if options.run is None:
        *_, found = fitted(original, target, options, 0)
    else:
        with torch.no_grad():
            found = Run.open(options.run, "last" if options.run.is_dir() else None).representation().weights()
    error = {key: found[key] - value for key, value in target.items()}
    factor = 1.0 if options.rmse is None else options.rmse / size(error)
    return {key: factor * value for key, value in error.items()}


def size(weights: Weights) -> float:
    """The root mean square over all weights."""
    return float(torch.cat([value.flatten() for value in weights.values()]).square().mean().sqrt())


def chain(
    original: Original, judge: Judge, error: Weights, select: str, number: int, options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """The rounds of a chain."""
    first = target = {key: value.cpu() for key, value in judge.representation.original_weights().items()}
    for round_ in range(1, options.rounds + 1):
        best, counts = None, []
        for trial in range(options.trials):
            seed = 1000 * number + 10 * (round_ - 1) + trial
            found: Iterable[Weights]
            if options.kind == "noise":
                found = noisy(target, error, options.evaluations, seed)
            else:
                found = fitted(original, target, options, seed)
            for weights in found:
                counts.append(judge.counts(weights))
                if best is None or counts[-1][select] >= best[0]:
                    best = counts[-1][select], weights, counts[-1]
        assert best is not None
        target = best[1]
        distance = size({key: target[key] - value for key, value in first.items()})
        yield {"round": round_, "distance": distance, "winner": best[2], "evaluations": counts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--original", required=True, help="NAME=FILE of a trained network")
    parser.add_argument("--images", type=Path, required=True, help="folder of CIFAR-10")
    parser.add_argument("--kind", choices=("fits", "noise"), default="noise")
    parser.add_argument("--select", nargs="+", choices=("test", "val", "half"), default=["test", "val", "half"])
    parser.add_argument("--hidden", type=int, default=300)
    parser.add_argument("--num_frequencies", type=int, default=40)
    parser.add_argument("--base", type=float, default=0.9)
    parser.add_argument("--order", choices=("in_filter", "cross_filter"), default="in_filter", help="of the kernels")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--run", type=Path, help="a Recon-only run that noise takes the error of (default: an own fit)")
    parser.add_argument("--rmse", type=float, help="size that noise is scaled to (default: that of the error)")
    parser.add_argument("--evaluations", type=int, default=10, help="evaluations per trial")
    parser.add_argument("--trials", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--chains", type=int, nargs="+", default=[0], help="numbers of the chains, their seeds")
    parser.add_argument("--margin", type=float, default=3.0, help="in units of logits")
    parser.add_argument("--check", type=int, default=0, metavar="DRAWS", help="check the margin on draws of noise")
    parser.add_argument("--device", default="cpu", help="of fits and images, for example cuda")
    parser.add_argument("--out", type=Path, default=Path("runs/selection"))
    options = parser.parse_args()
    network, _, file = options.original.partition("=")
    original = Original(network, checkpoint=file)
    options.out.mkdir(parents=True, exist_ok=True)
    representation = Representation(original, MLP(8), order="none")
    splits = ("test", "val") if "val" in options.select else ("test",)
    judge = Judge(representation, Measured(options.images, representation, splits), options.margin, options.device)
    weights = representation.original_weights()
    error = error_of(original, weights, options) if options.kind == "noise" else {}
    if options.check:
        # As far from the original as the last round.
        largest = {key: value * options.rounds**0.5 for key, value in error.items()}
        for candidate in noisy(weights, largest, options.check, 0):
            print("changed answers: {}, largest margin: {:.2f}".format(*judge.largest_margin(candidate)), flush=True)
        return
    record = options.out / "selection.jsonl"
    lines = [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []
    what = {"network": network, "hidden": options.hidden, "steps": options.steps, "kind": options.kind}
    what |= {"num_frequencies": options.num_frequencies, "base": options.base, "order": options.order}
    what |= {"run": str(options.run), "rmse": options.rmse, "evaluations_per_trial": options.evaluations}
    what |= {"trials": options.trials, "margin": options.margin}
    start = judge.counts(weights)
    for number in options.chains:
        for select in options.select:
            asked = {**what, "select": select, "chain": number}
            if sum(asked.items() <= line.items() for line in lines) >= options.rounds:
                continue
            lines = [line for line in lines if not asked.items() <= line.items()]
            for round_ in chain(original, judge, error, select, number, options):
                lines.append({**asked, "original": start, **round_})
                record.write_text("".join(json.dumps(line) + "\n" for line in lines))
    images = {name: len(split.labels) for name, split in judge.splits.items()}
    sizes = {**images, "half": (images["test"] + 1) // 2, "rest": images["test"] // 2}
    Console().print(summary([line for line in lines if what.items() <= line.items()], sizes, options.trials))


def summary(lines: list[dict[str, Any]], sizes: Mapping[str, int], trials: int) -> Table:
    """Gains over the original in points, mean and standard deviation over the chains (and evaluations)."""
    rounds = sorted({line["round"] for line in lines})
    title = "gain in points: one evaluation, a trial's best, and each round's winner"
    table = Table(title=title, title_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0))
    for column in ("selected on", "gain on", "chains", "one", "trial"):
        table.add_column(column, no_wrap=True)
    for number in rounds:
        table.add_column(f"{number}", no_wrap=True)

    def spread(found: list[dict[str, int]], on: str) -> str:
        values = [100 * (each[on] - lines[0]["original"][on]) / sizes[on] for each in found]
        deviation = f"\n± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):+.2f}{deviation}"

    for select in dict.fromkeys(line["select"] for line in lines):
        by_round = {
            number: [line for line in lines if (line["select"], line["round"]) == (select, number)] for number in rounds
        }
        first = by_round[rounds[0]]
        evaluations = [each for line in first for each in line["evaluations"]]
        length = len(first[0]["evaluations"]) // trials
        parts = [evaluations[start : start + length] for start in range(0, len(evaluations), length)]
        best = [max(part, key=lambda each: each[select]) for part in parts]
        for on in dict.fromkeys((select, {"half": "rest"}.get(select, "test"))):
            winners = [
                spread([line["winner"] for line in by_round[number]], on) for number in rounds if by_round[number]
            ]
            table.add_row(select, on, str(len(first)), spread(evaluations, on), spread(best, on), *winners)
    return table


if __name__ == "__main__":
    main()
