from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nernlit.cli.main import run
from nernlit.errors import UsageError
from tests.fakes import CONFIGS, QUICK
from tests.training.test_decoupled_distill import QUICK_DECOUPLED
from tests.training.test_progressive import QUICK_PROGRESSIVE

MODEL = "--model.init_args"
OPTIMIZERS = {
    "muon": [],
    "lookahead_radam": ["--schedule=paper", *QUICK[2:]],
    "ranger21": [
        f"{MODEL}.optimizer=nernlit.optimizers.ranger21.Ranger21",
        f"{MODEL}.optimizer.init_args.lr=0.005",
        f"{MODEL}.scheduler=null",
    ],
    "decoupled": QUICK_DECOUPLED,
    "quantized": [*QUICK_DECOUPLED, "--model.representation.quantize.bits=4"],
    "cached": [*QUICK_DECOUPLED, "--data.pad_crop=0", "--data.flip=false", "--model.cache_teacher=true"],
    "averaged": [*QUICK_DECOUPLED, "--model.ema=0.7"],
    "moving": [
        *(option for option in QUICK_DECOUPLED if "hidden" not in option),
        "--model.representation.predictor=Codebooks",
        "--model.representation.predictor.codebooks=2",
        "--model.representation.predictor.bits=3",
        "--model.representation.predictor.move=0.1",
        "--model.representation.predictor.move_rate=0.3",
        "--model.optimizer=torch.optim.Adam",
        "--model.optimizer.lr=0.01",
        "--model.reconstruction.optimizer=torch.optim.Adam",
        "--model.reconstruction.optimizer.lr=0.01",
    ],
    "progressive": QUICK_PROGRESSIVE,
    "sensitivity": ["--model.sensitivity.kind=fisher", "--model.sensitivity.num_images=16"],
    "rate": [
        "-c",
        str(CONFIGS / "digits_table_decoupled.yaml"),
        "--model.rate.target_bytes=17000",
        "--trainer.check_val_every_n_epoch=1",
        "--data.batch_size=500",
        *QUICK[5:],
    ],
    "original": ["-c", str(CONFIGS / "digits_original.yaml"), QUICK[2], *QUICK[5:]],
}


#: Before which batch the power goes: in the middle of an epoch that is not the first, in every phase or round.
CASES: list[Any] = [("muon", 7), ("lookahead_radam", 7), ("ranger21", 7), ("original", 25), ("rate", 3)]
CASES += [("sensitivity", 7)]
CASES += [("decoupled", 3), ("quantized", 3), ("averaged", 5), ("cached", 5), ("moving", 5), ("progressive", 6)]
MORE_CASES = [("decoupled", 2), ("decoupled", 5), ("quantized", 2), ("quantized", 5), ("moving", 2)]
MORE_CASES += [("progressive", 3), ("progressive", 9)]
CASES += [pytest.param(*case, marks=pytest.mark.slow) for case in MORE_CASES]


@pytest.mark.parametrize(("optimizer", "kill_at"), CASES)
def test_a_killed_fit_ends_with_the_same_weights_to_the_bit(optimizer: str, kill_at: int) -> None:
    line = ["fit", *OPTIMIZERS[optimizer]]
    if OPTIMIZERS[optimizer][:1] != ["-c"]:
        line = ["fit", *QUICK, *OPTIMIZERS[optimizer]]
    if optimizer not in ("decoupled", "averaged", "moving", "progressive"):
        line.append("--trainer.max_epochs=3")
    whole, killed = "--trainer.logger.init_args.save_dir=whole", "--trainer.logger.init_args.save_dir=killed"
    run([*line, whole])
    with pytest.raises(ConnectionAbortedError):
        run([*line, killed, "--trainer.callbacks=tests.fakes.PowerCut", f"--trainer.callbacks.before_batch={kill_at}"])
    run([*line, killed, "--ckpt_path=last"])

    ends = [torch.load(next(Path(name).rglob("last.ckpt")), weights_only=True) for name in ("whole", "killed")]
    assert ends[0]["global_step"] == ends[1]["global_step"]
    for key, value in ends[0]["state_dict"].items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, ends[1]["state_dict"][key]), key

    assert ("predictor_training" in ends[0]) == (optimizer == "moving")
    if optimizer == "moving":
        drifts = [end["predictor_training"]["drift"] for end in ends]
        assert bool(drifts[0].any())
        assert torch.equal(*drifts)

    assert ("moving_average" in ends[0]) == (optimizer == "averaged")
    if optimizer == "averaged":
        for name, value in ends[0]["moving_average"]["last"].items():
            assert torch.equal(ends[1]["moving_average"]["last"][name], value), name
            assert not torch.equal(ends[0]["state_dict"][name], value), name

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


def test_a_fit_is_not_resumed_with_a_length_that_it_has_passed() -> None:
    run(["fit", *QUICK])
    with pytest.raises(UsageError, match=r"from step 10 of a fit whose stages end .* \[10\]; .* they end after \[5\]"):
        run(["fit", *QUICK, "--trainer.max_epochs=1", "--ckpt_path=last"])
    longer = run(["fit", *QUICK, "--trainer.max_epochs=3", "--ckpt_path=last"])
    assert longer.trainer.global_step == 15
