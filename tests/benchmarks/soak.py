"""The commands of `make demo` again and again, killed and continued: `python -m tests.benchmarks.soak --iterations 50`.

In each iteration about every second command is killed (SIGKILL) at a random moment, and all are finished by one process
that lives as long as the soak. It fails if a result differs from that of the first, undisturbed iteration, or if that
process's memory, or what is on disk besides results, grows: files in the folder of temporary files, in the home folder
and in numba's cache, and the files that an iteration leaves in the folder of its runs.

The figures of each iteration are written to a table as they are measured.
"""

import argparse
import contextlib
import io
import os
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import psutil

import nernlit
from nernlit.cli.main import main
from nernlit.cli.sweep_fit import forget_peak_memory, peak_memory_mib
from nernlit.storage.files import write_table
from nernlit.utilities.tables import print_table
from tests.benchmarks.killed import DONE, KILLED, Moment, contents, difference, prepare, require_whole, run
from tests.fakes import CONFIGS, QUICK

#: Configurations with the budget of a few steps.
_CONFIGURATIONS = {
    "recon": f"base: {CONFIGS / 'digits_h96.yaml'}\ndata: {{init_args: {{steps_per_epoch: 5}}}}\n",
    "decoupled": f"base: {CONFIGS / 'digits_h96_decoupled.yaml'}\n"
    "data: {init_args: {batch_size: 500}}\nmodel: {init_args: {reconstruction: {steps: 3}}}\n",
}
_QUICK = ["--trainer.max_epochs=2", "--trainer.check_val_every_n_epoch=1", *QUICK[5:]]
_IMAGES = ["--data", "DigitsDataModule", "--data.batch_size=400"]
_DEMO = [
    ["sweep", "--configs", "recon.yaml", "decoupled.yaml", "--hidden", "8", "--out", "out", *_QUICK],
    ["report", "out/recon_h8_seed0", "out/decoupled_h8_seed0", "--out", "out/report.html"],
    ["export", "out/decoupled_h8_seed0", "-o", "out/digits.nern"],
    ["test", "out/digits.nern", "--data", "DigitsDataModule"],
    ["compress", "digits_resnet8", "-o", "out/small.nern", "--out_runs", "runs", "--epochs=1", *_IMAGES, *QUICK[5:]],
]
#: How much a figure may grow, as a share: from the second quarter of the iterations to the last.
_TOLERANCES = {"peak_mib": 0.02, "rss_mib": 0.02, "other_files": 0.0, "other_bytes": 0.0, "files": 0.15, "bytes": 0.15}
_FEWEST = 8
#: How often a command is killed before it is continued, and then again.
_KILLED_SHARE = 0.3


def _log_into(folder: Path) -> None:
    """Write into a file what Lightning reports, which keeps the standard error of its import."""
    os.dup2(os.open(folder / "worker.log", os.O_WRONLY | os.O_CREAT), 2)


def finish(args: Sequence[str], folder: Path, temporary: Path) -> tuple[str, float, float]:
    """Run a command in this process: what it printed, and the process's peak memory and memory in MiB."""
    forget_peak_memory()
    tempfile.tempdir = str(temporary)
    said = io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        main(args)
    return said.getvalue(), peak_memory_mib(), psutil.Process().memory_info().rss / 2**20


def occupied(paths: Iterable[Path]) -> tuple[int, int]:
    """The number of files among paths, and their bytes."""
    files = [path for path in paths if not path.is_dir()]
    return len(files), sum(file.lstat().st_size for file in files)


def growth(values: Sequence[float]) -> float:
    """How much the median grows from the second quarter to the last, as a share of the former.

    >>> growth([9, 5, 2, 2, 2, 2, 2, 3])
    0.25
    """
    quarter = len(values) // 4
    before, after = statistics.median(values[quarter : 2 * quarter]), statistics.median(values[-quarter:])
    return (after - before) / max(before, 1)


class Soak:
    """The iterations, each in a new folder of the same name.

    Args:
        folder: Folder of everything.
        numbers: Decides which commands are killed, and when.
    """

    def __init__(self, folder: Path, numbers: random.Random) -> None:
        self.numbers = numbers
        self.work, self.temporary, self.home = (folder / name for name in ("work", "tmp", "home"))
        for made in (self.temporary, self.home):
            made.mkdir()
        os.environ.update(HOME=str(self.home), TMPDIR=str(self.temporary))
        os.environ.pop("XDG_CACHE_HOME", None)
        self.worker = ProcessPoolExecutor(1, get_context("fork"), _log_into, [folder])
        self._start()
        self.undisturbed = [run(args, self.work, self.temporary) for args in _DEMO]
        assert {each.outcome for each in self.undisturbed} == {DONE}, (self.work / "log").read_text()
        self.expected = self._results([each.said for each in self.undisturbed])

    def _start(self) -> None:
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir()
        for name, content in _CONFIGURATIONS.items():
            (self.work / f"{name}.yaml").write_text(content)

    def _results(self, said: Sequence[str]) -> dict[str, object]:
        """What the commands left, and what `test` printed."""
        tested = {args[0]: text for args, text in zip(_DEMO, said, strict=True) if args[0] == "test"}
        return contents(self.work) | tested

    def iteration(self) -> dict[str, float]:
        """Run all commands: the figures.

        Raises:
            AssertionError: If a command fails, or a result differs.
        """
        self._start()
        began, kills, said, peaks = time.monotonic(), 0, list[str](), list[float]()
        for args, undisturbed in zip(_DEMO, self.undisturbed, strict=True):
            while self.numbers.random() < _KILLED_SHARE:
                ended = run(args, self.work, self.temporary, Moment.draw(self.numbers, undisturbed))
                assert ended.outcome in (DONE, KILLED), f"{args}: {ended.outcome}; see {self.work}/log"
                kills += ended.outcome == KILLED
                require_whole(self.work)
            text, peak, rss = self.worker.submit(finish, args, self.work, self.temporary).result()
            said.append(text)
            peaks.append(peak)
        differs = difference(self.expected, self._results(said))
        assert differs is None, f"{self.work}: {differs}"
        files, size = occupied(self.work.rglob("*"))
        caches = Path(nernlit.__file__).parent.rglob("*.nb[ci]")
        other_files, other_size = occupied([*self.temporary.rglob("*"), *self.home.rglob("*"), *caches])
        return {
            "kills": kills,
            "seconds": round(time.monotonic() - began, 1),
            "peak_mib": round(max(peaks), 1),
            "rss_mib": round(rss, 1),
            "other_files": other_files,
            "other_bytes": other_size,
            "files": files,
            "bytes": size,
        }


def soak(iterations: int, seed: int, out: Path, folder: Path) -> list[str]:
    """Run iterations, write their figures, and return what has grown."""
    commands = Soak(folder, random.Random(seed))
    rows: list[dict[str, float]] = []
    for number in range(1, iterations + 1):
        rows.append({"iteration": number, **commands.iteration()})
        write_table(out, rows)
        print(", ".join(f"{name} {value:,}" for name, value in rows[-1].items()), flush=True)
    if len(rows) < _FEWEST:
        print(f"fewer than {_FEWEST} iterations do not tell whether anything grows")
        return []
    grown = {name: growth([row[name] for row in rows]) for name in _TOLERANCES}
    shown = [[name, f"{rows[0][name]:,}", f"{rows[-1][name]:,}", f"{share:+.2%}"] for name, share in grown.items()]
    print_table(f"{len(rows)} iterations", ["figure", "first", "last", "growth"], shown)
    return [f"{name} grows by {share:.2%}" for name, share in grown.items() if share > _TOLERANCES[name]]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=50, help="default: 50")
    parser.add_argument("--seed", type=int, default=0, help="of the kills (default: 0)")
    parser.add_argument("--out", type=Path, default=Path("runs/soak.csv"), help="table (default: runs/soak.csv)")
    return parser.parse_args()


def _main(options: argparse.Namespace) -> None:
    prepare()
    folder = Path(tempfile.mkdtemp(prefix="nernlit_soak_"))
    print(f"in {folder}", flush=True)
    if grown := soak(options.iterations, options.seed, options.out.resolve(), folder):
        raise SystemExit("; ".join(grown))
    shutil.rmtree(folder)


if __name__ == "__main__":
    _main(_options())
