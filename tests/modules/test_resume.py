from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nernlit.cli import run
from tests.fakes import CONFIGS, QUICK

MODEL = "--model.init_args"
OPTIMISERS = {
    "muon": [],
    "lookahead_radam": ["-c", str(CONFIGS / "base" / "paper.yaml"), *QUICK[2:]],
    "ranger21": [
        f"{MODEL}.optimizer=nernlit.optimisers.ranger21.Ranger21",
        f"{MODEL}.optimizer.init_args.lr=0.005",
        f"{MODEL}.scheduler=null",
    ],
    "original": ["-c", str(CONFIGS / "digits_original.yaml"), *QUICK[2:4], *QUICK[5:]],
}


@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_a_killed_fit_ends_with_the_same_weights_to_the_bit(optimiser: str) -> None:
    start = QUICK if optimiser != "original" else []
    line = ["fit", *start, *OPTIMISERS[optimiser], "--trainer.max_epochs=3"]
    whole, killed = "--trainer.logger.init_args.save_dir=whole", "--trainer.logger.init_args.save_dir=killed"
    run([*line, whole])
    kill_at = 25 if optimiser == "original" else 7  # in the middle of the second epoch
    with pytest.raises(ConnectionAbortedError):
        run([*line, killed, "--trainer.callbacks=tests.fakes.PowerCut", f"--trainer.callbacks.before_batch={kill_at}"])
    run([*line, killed, "--ckpt_path=last"])

    ends = [torch.load(next(Path(name).rglob("last.ckpt")), weights_only=True) for name in ("whole", "killed")]
    assert ends[0]["global_step"] == ends[1]["global_step"]
    for key, value in ends[0]["state_dict"].items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, ends[1]["state_dict"][key]), key

    # One folder and one curve: every step once, with the losses of the uninterrupted run.
    curves = []
    for name in ("whole", "killed"):
        (folder,) = Path(name).glob("*/version_*")
        events = EventAccumulator(str(folder)).Reload()
        curves.append({event.step: event.value for event in events.Scalars("train/loss")})
    assert curves[0] == curves[1]


def test_last_without_a_checkpoint_starts_at_the_beginning() -> None:
    cli = run(["fit", *QUICK, "--ckpt_path=last"])
    assert cli.trainer.global_step == 10
