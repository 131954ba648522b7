"""A fit while other programs run: `python -m tests.benchmarks.busy THREADS STEPS` prints its seconds as JSON.

THREADS is a number, or `auto`. Every fit is a process of its own, on small steps, which suffer most: H=128, 1,024
kernels per step, Adam. What is timed is training, from the first step to the last.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import lightning as L
import torch

from nernlit.callbacks import CpuThreads
from nernlit.data import DigitsDataModule
from nernlit.kernels import Uniform
from nernlit.originals import Original
from nernlit.predictors import MLP
from nernlit.representation import Representation
from nernlit.training import ReconOnly

Threads = int | Literal["auto"]


class _Clock(L.Callback):
    def on_train_start(self, *_: Any) -> None:
        self.began = time.perf_counter()

    def on_train_end(self, *_: Any) -> None:
        self.seconds = time.perf_counter() - self.began


def fit_seconds(threads: Threads, steps: int) -> float:
    """Seconds of a fit in this process."""
    clock = _Clock()
    representation = Representation(Original("digits_resnet8", pretrained=True), MLP(128), order="none")
    module = ReconOnly(representation, torch.optim.Adam, sampling=Uniform(1024))
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[CpuThreads(threads), clock],
    )
    trainer.fit(module, datamodule=DigitsDataModule(train_on="none", steps_per_epoch=steps))
    return clock.seconds


def started(threads: Threads, steps: int) -> "subprocess.Popen[str]":
    """A fit in a process of its own."""
    command = [sys.executable, "-m", "tests.benchmarks.busy", str(threads), str(steps)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def seconds_of(*fits: "subprocess.Popen[str]") -> list[float]:
    """Their training seconds, when all of them have ended."""
    return [json.loads(fit.communicate()[0].splitlines()[-1])["seconds"] for fit in fits]


@contextmanager
def busy_process() -> Iterator[None]:
    """Another program that takes a whole core."""
    other = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        other.kill()
        other.wait()


def beside_a_busy_process(threads: Threads, steps: int) -> dict[str, float]:
    """Steps per second alone, beside a busy process, and the share of the speed that is left."""
    (alone,) = seconds_of(started(threads, steps))
    with busy_process():
        (beside,) = seconds_of(started(threads, steps))
    return {"steps_per_s": steps / alone, "beside_busy_per_s": steps / beside, "of_alone": alone / beside}


def side_by_side(threads: Threads, steps: int) -> dict[str, float]:
    """Seconds of two fits at once over seconds of two fits one after the other."""
    after_another = sum(seconds_of(started(threads, steps))[0] for _ in range(2))
    at_once = max(seconds_of(started(threads, steps), started(threads, steps)))
    return {"at_once_s": at_once, "after_another_s": after_another, "of_after_another": at_once / after_another}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("threads")
    parser.add_argument("steps", type=int)
    options = parser.parse_args()
    chosen: Threads = "auto" if options.threads == "auto" else int(options.threads)
    print(json.dumps({"seconds": fit_seconds(chosen, options.steps)}))
