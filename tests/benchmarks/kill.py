"""Kills runs at random moments and continues them: `python -m tests.benchmarks.kill --kills 200`.

Half of the kills (SIGKILL) come at a random time, half at a random call that writes a file, of which half is written.
A killed run is continued as the documentation says, and may be killed again; what it leaves at its end must be equal to
the bit to what an uninterrupted one leaves. After each kill all checkpoints and .nern files must be whole.

Every run is a fork of a process that has imported everything, and has its temporary files on another file system.
"""

import argparse
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from nernlit.utilities.tables import print_table
from tests.benchmarks.killed import DONE, KILLED, Moment, Run, contents, difference, prepare, require_whole, run
from tests.fakes import CONFIGS, QUICK
from tests.training.test_decoupled_distill import QUICK_DECOUPLED
from tests.training.test_progressive import QUICK_PROGRESSIVE

FIT = ["fit", "--ckpt_path=last"]  # of a run that has no checkpoint yet, it is the first call
_IMAGES = ["--data", "DigitsDataModule", "--data.batch_size=400", *QUICK[5:]]
_COMPRESS = ["compress", "digits_resnet8", "-o", "out/small.nern", "--out_runs", "fits"]
_SWEEP = ["sweep", "--configs", QUICK[1], "--seeds", "0", "1", "--out", "out", *QUICK[2:]]
RUNS = {
    "ReconOnly": [*FIT, *QUICK, "--trainer.max_epochs=4"],
    "BaselineJoint": [
        *FIT, "-c", str(CONFIGS / "digits_h96_baseline.yaml"), "--trainer.max_epochs=3", "--data.batch_size=400",
        "--trainer.check_val_every_n_epoch=1", "--model.warmup_steps=2", *QUICK[4:],
    ],
    "DecoupledDistill": [*FIT, *QUICK_DECOUPLED],
    "Progressive": [*FIT, *QUICK_PROGRESSIVE],
    "OriginalModule": [*FIT, "-c", str(CONFIGS / "digits_original.yaml"), "--trainer.max_epochs=3", *QUICK[5:]],
    "compress": [*_COMPRESS, "--epochs=3", *_IMAGES],
    "compress --target_drop": [*_COMPRESS, "--epochs=1", "--target_drop=60", *_IMAGES],
    "export": ["export", "runs/fit", "-o", "out/net.nern"],
    "compare": [
        "compare", "digits_resnet8", "--methods", "round", "round_distill", "--bits", "2",
        "--epochs=1", "--out", "out", *_IMAGES,
    ],
    # Values that no chance decides.
    "search": [
        "search", "-c", QUICK[1], "--space", "model.optimizer.lr=choice(0.01)", "--trials=2", "--out", "out",
        *(option for option in QUICK[2:] if "devices" not in option),
    ],
    "sweep": _SWEEP,
    "sweep --jobs": [*_SWEEP, "--jobs=2"],
}  # fmt: skip


def _kills(counts: Mapping[str, Counter[str]]) -> int:
    return sum(count["in a write"] + count["at a time"] for count in counts.values())


def campaign(kills: int, seed: int, names: Sequence[str], folder: Path, temporary: Path) -> int:
    """Kill and continue runs of each kind in turn, print a table, and return the number of failures."""
    numbers = random.Random(seed)
    whole: dict[str, tuple[Run, dict[str, object]]] = {}
    counts: dict[str, Counter[str]] = {name: Counter() for name in names}
    failures: list[str] = []
    fit = folder / "fit"
    fit.mkdir(parents=True)
    assert run(RUNS["ReconOnly"], fit, temporary).outcome == DONE, (fit / "log").read_text()

    def start(name: str, at: str) -> Path:
        own = folder / f"{name.replace(' --', '_')}_{at}"
        own.mkdir()
        if name == "export":
            shutil.copytree(next(fit.glob("runs/*/version_0")), own / "runs" / "fit")
        return own

    for name in names:
        own = start(name, "whole")
        reference = run(RUNS[name], own, temporary)
        assert reference.outcome == DONE, (own / "log").read_text()
        whole[name] = reference, contents(own)
        print(f"{name}: {reference.calls} calls, {reference.seconds:.1f} s, {len(whole[name][1])} files", flush=True)
    chain = 0
    try:
        while _kills(counts) < kills:
            name = names[chain % len(names)]
            chain += 1
            reference, expected = whole[name]
            own, count = start(name, str(chain)), counts[name]
            ended: Run | None = None
            for _ in range(numbers.randint(1, 5)):
                moment = Moment.draw(numbers, reference)
                ended = run(RUNS[name], own, temporary, moment)
                if ended.outcome != KILLED:
                    break
                count["at a time" if moment.call is None else "in a write"] += 1
                count["before a checkpoint"] += not any(own.rglob("last.ckpt"))
                require_whole(own)
            if ended is None or ended.outcome != DONE:
                ended = run(RUNS[name], own, temporary)
            count["runs"] += 1
            problem = ended.outcome if ended.outcome != DONE else difference(expected, contents(own))
            if problem is None:
                count["equal"] += 1
                print(f"{chain}: {name}, kills so far: {_kills(counts)}", flush=True)
                shutil.rmtree(own)
            else:
                failures.append(f"{own}: {problem}")
                print(f"FAILED {failures[-1]}", flush=True)
    finally:  # also where a signal ends the campaign
        columns = ("runs", "at a time", "in a write", "before a checkpoint", "equal")
        rows = [[name, *(str(count[column]) for column in columns)] for name, count in counts.items()]
        rows.append(["together", *(str(sum(count[column] for count in counts.values())) for column in columns)])
        print_table(f"SIGKILL, seed {seed}", ["command", *columns], rows)
    return len(failures)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="at least so many (default: 200)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS), help="default: all")
    parser.add_argument("--tmpdir", default="/dev/shm", help="where temporary files are (default: /dev/shm)")
    return parser.parse_args()


def _main(options: argparse.Namespace) -> None:
    prepare()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    folder = Path(tempfile.mkdtemp(prefix="nernlit_kill_"))
    temporary = Path(tempfile.mkdtemp(prefix="nernlit_kill_", dir=options.tmpdir))
    same = folder.stat().st_dev == temporary.stat().st_dev
    print(f"runs in {folder}; TMPDIR={temporary}, on {'the same' if same else 'another'} file system", flush=True)
    began = time.monotonic()
    failures = campaign(options.kills, options.seed, options.runs, folder, temporary)
    print(f"{time.monotonic() - began:.0f} s, failures: {failures}")
    shutil.rmtree(temporary)
    if failures:
        raise SystemExit(1)
    shutil.rmtree(folder)


if __name__ == "__main__":
    _main(_options())
