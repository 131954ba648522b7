"""What selection alone gains at CR > 1: `python -m tests.benchmarks.selection --original NAME=FILE --images DIR`.

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
import json
import statistics
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from nernlit.analysis import noise_like
from nernlit.kernels import Uniform
from nernlit.losses import reconstruction_mse
from nernlit.optimizers import WarmupCosine
from nernlit.originals import Original
from nernlit.predictors import MLP
from nernlit.representation import Representation
from tests.benchmarks.study import Setting, built_optimizer
from tests.benchmarks.study_images import Measured, logits

Weights = dict[str, Tensor]
Select = Literal["test", "val", "half"]


@dataclass(frozen=True)
class Judge:
    """Counts correct answers: on all test images, on every second one, on the others, and on the validation images."""

    representation: Representation
    measured: Measured
    margin: float

    def counts(self, weights: Mapping[str, Tensor], margin: float | None = None) -> dict[str, int]:
        test_N, val_N = (self._correct(name, weights, margin or self.margin) for name in ("test", "val"))
        parts = {"test": test_N, "half": test_N[::2], "rest": test_N[1::2], "val": val_N}
        return {name: int(correct_N.sum()) for name, correct_N in parts.items()}

    def changed(self, weights: Mapping[str, Tensor]) -> tuple[int, int]:
        """The number of test images whose answer changes, and of those that have a large margin."""
        all_N = self._correct("test", weights, float("inf"))
        before_N, pruned_N = (self._correct("test", weights, margin) for margin in (0.0, self.margin))
        return int((all_N != before_N).sum()), int((all_N != pruned_N).sum())

    def _correct(self, name: str, weights: Mapping[str, Tensor], margin: float) -> Tensor:
        split = self.measured.splits[name]
        answers_N = split.original.argmax(1)
        largest_N2 = split.original.topk(2, dim=1).values
        close_N = largest_N2[:, 0] - largest_N2[:, 1] < margin
        if close_N.any():
            answers_N[close_N] = logits(self.representation, weights, split.pixels[close_N]).argmax(1)
        return answers_N == split.labels


def fitted(original: Original, target: Weights, options: argparse.Namespace, seed: int) -> Iterator[Weights]:
    """Weights that a Recon-only fit to the target reconstructs, at equal distances in the second half of its steps."""
    torch.manual_seed(seed)
    mlp = MLP(options.hidden, activation="gelu", base=0.9)
    whole = Representation(original, mlp)
    target_NKK = whole.layout.table(target, mlp.block) / whole.scale
    optimizer = built_optimizer(Setting(), mlp.parameters())
    schedule = WarmupCosine(optimizer, 50, total_steps=options.steps)
    norms, half = target_NKK.flatten(1).norm(dim=1), options.steps // 2
    at = {options.steps - half * number // options.evaluations for number in range(options.evaluations)}
    for step in range(1, options.steps + 1):
        rows = Uniform(4096).indices(norms, seed, step)
        with torch.autocast("cpu", torch.bfloat16):
            predicted = whole.kernels(rows)
        optimizer.zero_grad()
        reconstruction_mse(predicted / whole.scale, target_NKK[rows], whole.mask(rows)).backward()
        optimizer.step()
        schedule.step()
        if step in at:
            with torch.no_grad():
                yield {key: value.clone() for key, value in whole.weights().items()}


def noisy(target: Weights, error: Weights, evaluations: int, seed: int) -> Iterator[Weights]:
    """The target plus independent noise with the spectrum of the error."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(evaluations):
        noise = noise_like(error, generator)
        yield {key: value + noise[key] for key, value in target.items()}


def chain(
    original: Original, judge: Judge, fit: list[Weights], select: Select, number: int, options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """The rounds of a chain; `fit` are the evaluations of the fit with seed 0 to the original."""
    first = target = judge.representation.original_weights()
    error = {key: fit[-1][key] - value for key, value in first.items()}
    for round_ in range(1, options.rounds + 1):
        best, counts = None, []
        for trial in range(options.trials):
            seed = 1000 * number + 10 * (round_ - 1) + trial
            found: Iterable[Weights]
            if options.kind == "noise":
                found = noisy(target, error, options.evaluations, seed)
            else:
                found = fitted(original, target, options, seed) if seed else fit
            for weights in found:
                counts.append(judge.counts(weights))
                if best is None or counts[-1][select] >= best[0]:
                    best = counts[-1][select], weights, counts[-1]
        assert best is not None
        target = best[1]
        rmse = judge.representation.layout.vector(target) - judge.representation.layout.vector(first)
        yield {"round": round_, "rmse": float(rmse.square().mean().sqrt()), "winner": best[2], "evaluations": counts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--original", required=True, help="NAME=FILE of a trained network")
    parser.add_argument("--images", type=Path, required=True, help="folder of CIFAR-10")
    parser.add_argument("--kind", choices=("fits", "noise"), default="noise")
    parser.add_argument("--select", nargs="+", choices=("test", "val", "half"), default=["test", "val", "half"])
    parser.add_argument("--hidden", type=int, default=300)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--evaluations", type=int, default=10, help="evaluations per trial")
    parser.add_argument("--trials", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--chains", type=int, nargs="+", default=[0], help="numbers of the chains, their seeds")
    parser.add_argument("--margin", type=float, default=6.0, help="in units of logits")
    parser.add_argument("--check", type=int, default=0, metavar="DRAWS", help="check the margin on draws of noise")
    parser.add_argument("--out", type=Path, default=Path("runs/selection"))
    options = parser.parse_args()
    network, _, file = options.original.partition("=")
    original = Original(network, checkpoint=file)
    options.out.mkdir(parents=True, exist_ok=True)
    representation = Representation(original, MLP(8), order="none")
    judge = Judge(representation, Measured(options.images, representation), options.margin)
    weights = representation.original_weights()
    file_of_fit = options.out / f"fit_{network}_h{options.hidden}_{options.steps}_{options.evaluations}.pt"
    if not file_of_fit.exists():
        torch.save(list(fitted(original, weights, options, 0)), file_of_fit)
    fit = torch.load(file_of_fit, weights_only=True)
    if options.check:
        # As far from the original as the last round.
        error = {key: (fit[-1][key] - value) * options.rounds**0.5 for key, value in weights.items()}
        for candidate in noisy(weights, error, options.check, 0):
            changed, with_margin = judge.changed(candidate)
            print(f"{changed} answers change, {with_margin} of them of images with a large margin")
        return
    record = options.out / "selection.jsonl"
    lines = [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []
    what = {"network": network, "hidden": options.hidden, "steps": options.steps, "kind": options.kind}
    start = judge.counts(weights)
    for number in options.chains:
        for select in options.select:
            asked = {**what, "select": select, "chain": number}
            if sum(asked.items() <= line.items() for line in lines) >= options.rounds:
                continue
            lines = [line for line in lines if not asked.items() <= line.items()]
            for round_ in chain(original, judge, fit, select, number, options):
                lines.append({**asked, "original": start, **round_})
                record.write_text("".join(json.dumps(line) + "\n" for line in lines))
    images = {name: len(judge.measured.splits[name].labels) for name in ("test", "val")}
    sizes = {**images, "half": (images["test"] + 1) // 2, "rest": images["test"] // 2}
    Console().print(summary([line for line in lines if what.items() <= line.items()], sizes, options.trials))


def summary(lines: list[dict[str, Any]], sizes: Mapping[str, int], trials: int) -> Table:
    """Gains over the original in points, mean and standard deviation over the chains (and evaluations)."""
    rounds = sorted({line["round"] for line in lines})
    table = Table(title="gain over the original, in points", title_justify="left")
    for column in ("selected on", "measured on", "chains", "one evaluation", "best of a trial"):
        table.add_column(column)
    for number in rounds:
        table.add_column(f"round {number}")

    def spread(found: list[dict[str, int]], on: str) -> str:
        values = [100 * (each[on] - lines[0]["original"][on]) / sizes[on] for each in found]
        deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
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
