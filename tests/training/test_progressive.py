import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, LambdaCallback, WeightAveraging
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from nernlit.cli.main import run
from nernlit.data import DigitsDataModule
from nernlit.errors import UsageError
from nernlit.kernels import AllKernels, Uniform, derive_seed
from nernlit.originals import Original
from nernlit.predictors import MLP
from nernlit.representation import Representation
from nernlit.training import Progressive, ReconOnly
from tests.fakes import CONFIGS, QUICK, quiet_trainer, tiny_representation

#: Three rounds of two trials, two epochs of two steps each, with a tiny predictor, on the command line.
QUICK_PROGRESSIVE = [
    "-c",
    str(CONFIGS / "digits_h128.yaml"),
    "--model.trials=2",
    "--model.min_delta=null",
    "--trainer.max_epochs=6",
    "--trainer.check_val_every_n_epoch=1",
    "--data.steps_per_epoch=2",
    *QUICK[4:],
]


def _adam(params: Iterator[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, lr=1e-2)


def _progressive(**options: object) -> Progressive:
    representation = Representation(Original("digits_resnet8", pretrained=True), MLP(8, num_frequencies=4))
    return Progressive(representation, optimizer=_adam, sampling=Uniform(64), **options)  # type: ignore[arg-type]


def _fit(module: Progressive | ReconOnly, epochs: int) -> None:
    data = DigitsDataModule(train_on="none", steps_per_epoch=3)
    quiet_trainer(max_epochs=epochs, num_sanity_val_steps=0).fit(module, datamodule=data)


def test_a_trial_is_a_recon_only_fit_of_its_seed() -> None:
    torch.manual_seed(7)
    module = _progressive(rounds=1, trials=2)
    alone = []
    for trial in module.trial_predictors.each:
        representation = Representation(Original("digits_resnet8", pretrained=True), MLP(8, num_frequencies=4))
        representation.predictor.load_state_dict(trial.state_dict())
        torch.manual_seed(7)  # the seed of the sampling
        alone.append(ReconOnly(representation, _adam, sampling=Uniform(64)))
        _fit(alone[-1], 2)
    torch.manual_seed(7)
    _fit(module, 2)
    for trial, single in zip(module.trial_predictors.each, alone, strict=True):
        for one, two in zip(trial.parameters(), single.representation.predictor.parameters(), strict=True):
            assert torch.allclose(one, two, rtol=1e-4, atol=1e-6)


def test_a_round_fits_what_the_best_trial_of_the_round_before_reconstructed() -> None:
    module = _progressive(rounds=2, trials=3, min_delta=None)
    assert torch.equal(module.round_target, module.representation.target)
    targets, winners, starts = [], [], []
    start = module.start_stage

    def watch() -> None:
        winners.append(module.representation.kernels().detach().clone())
        start()
        targets.append(module.round_target.clone())
        starts.append([p.detach().clone() for p in module.trial_predictors.parameters()])

    module.start_stage = watch  # type: ignore[method-assign]
    _fit(module, 2)
    assert len(targets) == 1
    assert torch.equal(targets[0], winners[0])  # 3x3 throughout: nothing to crop
    first, second = module.ended
    assert (first.round, second.round) == (1, 2)
    assert first.val_acc == max(first.val_acc_trials)
    assert first.trial == first.val_acc_trials.index(first.val_acc) or first.val_acc_trials.count(first.val_acc) > 1
    fresh = _progressive(rounds=2, trials=3).trial_predictors
    fresh.reset(*(derive_seed(module.seed, 1, trial) for trial in range(3)))
    for began, expected in zip(starts[0], fresh.parameters(), strict=True):
        assert torch.equal(began, expected)


def test_targets_of_smaller_kernels_hold_nothing_outside_them() -> None:
    module = Progressive(tiny_representation(), optimizer=_adam)
    module.start_stage()
    mask = module.representation.learned.mask()
    assert mask is not None
    assert (module.round_target[~mask] == 0).all()
    assert torch.equal(module.round_target[mask], module.representation.kernels()[mask])


def test_the_chain_ends_with_the_first_round_that_does_not_improve(capsys: pytest.CaptureFixture[str]) -> None:
    cli = run(["fit", *QUICK_PROGRESSIVE, "--model.min_delta=2.0"])  # more than any accuracy
    assert cli.trainer.global_step == 8
    records = json.loads((Path(cli.trainer.log_dir) / "rounds" / "rounds.json").read_text())
    assert [record["improved"] for record in records] == [True, False]
    capsys.readouterr()
    resumed = run(["fit", *QUICK_PROGRESSIVE, "--model.min_delta=2.0", "--ckpt_path=last"])
    assert resumed.trainer.global_step == 8
    assert "The fit ended after round 2, whose gain was not above min_delta." in capsys.readouterr().out
    smaller = run(["fit", *QUICK_PROGRESSIVE, "--model.min_delta=-2.0", "--ckpt_path=last"])
    assert smaller.trainer.global_step == 12
    assert [record.improved for record in smaller.model.ended] == [True, True, True]


def test_every_round_leaves_a_network_and_a_checkpoint(tmp_path: Path) -> None:
    cli = run(["fit", *QUICK_PROGRESSIVE])
    rounds = Path(cli.trainer.log_dir) / "rounds"
    names = [f"round-{number:02d}.{suffix}" for number in (1, 2, 3) for suffix in ("ckpt", "safetensors")]
    assert sorted(path.name for path in rounds.iterdir()) == sorted([*names, "rounds.json"])
    records = json.loads((rounds / "rounds.json").read_text())
    assert [record["round"] for record in records] == [1, 2, 3]

    # The network is what was measured, and timm loads it.
    last = rounds / "round-03.safetensors"
    net = timm.create_model("digits_resnet8", checkpoint_path=str(last)).eval()
    for key, value in cli.model.representation.reconstructed().items():
        assert torch.equal(net.state_dict()[key], value)

    # It serves as an original, and the checkpoint as Recon-only's and as phase 1.
    original = "--model.representation.original"
    fitted = run(["fit", *QUICK, f"{original}.pretrained=false", f"{original}.checkpoint={last}"])
    assert torch.equal(fitted.model.representation.original.net.conv1.weight, load_file(last)["conv1.weight"])
    tested = run(["test", *QUICK, f"--ckpt_path={rounds / 'round-02.ckpt'}"])
    validated = run(["validate", *QUICK, f"--ckpt_path={rounds / 'round-02.ckpt'}"])
    assert float(validated.trainer.callback_metrics["val/acc"]) == pytest.approx(records[1]["val_acc"])
    assert float(tested.trainer.callback_metrics["test/recon_rmse"]) == pytest.approx(records[1]["recon_rmse"])
    chained = ["fit", "-c", str(tmp_path / "chain.yaml"), *QUICK[5:], "--trainer.max_epochs=1"]
    (tmp_path / "chain.yaml").write_text(
        f"base: [{CONFIGS / 'base' / 'progressive.yaml'}]\n"
        f"model: {{init_args: {{rounds: 1, init_from: {rounds / 'round-01.ckpt'}}}}}\n"
        "data: {init_args: {steps_per_epoch: 1}}\n"
        "trainer: {check_val_every_n_epoch: 1, logger: {init_args: {name: chain}}}\n"
    )
    module = run(chained).model
    wanted = load_file(rounds / "round-01.safetensors")["conv1.weight"]
    got = module.representation.layout.weights(module.round_target)["conv1.weight"]
    assert torch.allclose(got, wanted)


def test_tensorboard_has_a_curve_a_round_and_a_figure() -> None:
    cli = run(["fit", *QUICK_PROGRESSIVE])
    events = EventAccumulator(cli.trainer.log_dir).Reload()
    for number in (1, 2, 3):
        steps = [event.step for event in events.Scalars(f"train/recon_round_{number}")]
        assert steps == list(range(4 * number - 4, 4 * number))
        assert len(events.Scalars(f"val/acc_round_{number}")) == 2
    assert "rounds" in events.Tags()["images"]


def test_epochs_that_make_no_whole_rounds_are_refused() -> None:
    with pytest.raises(UsageError, match="max_epochs=5, rounds=2, check_val_every_n_epoch=1: a round must have"):
        _fit(_progressive(rounds=2), 5)
    with pytest.raises(UsageError, match="rounds=0, trials=3; expected at least 1 of both"):
        _progressive(rounds=0)
    with pytest.raises(UsageError, match="limit_val_batches=0: Progressive chooses"):
        quiet_trainer(max_epochs=2, limit_val_batches=0).fit(
            _progressive(rounds=2), datamodule=DigitsDataModule(train_on="none", steps_per_epoch=3)
        )


def test_rounds_are_counted_in_steps_of_the_optimizer() -> None:
    module = _progressive(rounds=2, trials=1, min_delta=None)
    data = DigitsDataModule(train_on="none", steps_per_epoch=3)
    quiet_trainer(max_epochs=2, accumulate_grad_batches=2, num_sanity_val_steps=0).fit(module, datamodule=data)
    assert [ended.round for ended in module.ended] == [1, 2]


def test_trials_of_different_seeds_share_none() -> None:
    starts = set()
    for seed in range(3):
        torch.manual_seed(seed)
        module = _progressive(trials=4)
        for stage in range(3):
            module.stage = stage
            module._start_trials()
            starts |= {tuple(trial.first.weight.flatten().tolist()) for trial in module.trial_predictors.each}
    assert len(starts) == 3 * 3 * 4


def test_a_finished_module_can_be_trained_on_by_hand() -> None:
    module = _progressive(rounds=1, trials=2)
    _fit(module, 1)
    module.representation.kernels().square().sum().backward()
    assert all(p.grad is not None for p in module.representation.predictor.parameters())


def test_the_explained_power_of_a_step_is_that_of_all_trials() -> None:
    module = _progressive(rounds=1, trials=2)
    module.stages[0].objective.sampling = AllKernels()
    representation = module.representation
    kernels = [representation.kernels(predictor=trial) for trial in module.trial_predictors.each]
    target = representation.target
    explained = [float(1 - (k - target).square().sum().detach() / target.square().sum()) for k in kernels]
    seen: list[float] = []
    note = LambdaCallback(
        on_train_batch_end=lambda trainer, *_: seen.append(float(trainer.callback_metrics["train/explained_power"]))
    )
    data = DigitsDataModule(train_on="none", steps_per_epoch=1)
    quiet_trainer(max_epochs=1, num_sanity_val_steps=0, callbacks=[note]).fit(module, datamodule=data)
    assert explained[0] != pytest.approx(explained[1], abs=1e-4)
    assert seen == [pytest.approx(sum(explained) / 2, abs=1e-5)]


@pytest.mark.parametrize(
    ("options", "ends"),
    [(["--trainer.max_epochs=12"], r"\[8, 16, 24\]"), (["--trainer.max_epochs=3"], r"\[2, 4, 6\]")],
)
def test_rounds_that_are_over_are_not_redone(options: list[str], ends: str) -> None:
    with pytest.raises(ConnectionAbortedError):
        run(
            [
                "fit",
                *QUICK_PROGRESSIVE,
                "--trainer.callbacks=tests.fakes.PowerCut",
                "--trainer.callbacks.before_batch=7",
            ]
        )
    files = {path: path.read_bytes() for path in Path("runs").rglob("rounds/*")}
    with pytest.raises(
        UsageError, match=rf"from step 6 of a fit whose stages end after the steps \[4, 8, 12\].*{ends}"
    ):
        run(["fit", *QUICK_PROGRESSIVE, *options, "--ckpt_path=last"])
    assert {path: path.read_bytes() for path in Path("runs").rglob("rounds/*")} == files


def test_a_finished_chain_goes_on_with_more_rounds_of_the_same_length(tmp_path: Path) -> None:
    data = DigitsDataModule(train_on="none", steps_per_epoch=3)
    trainer = quiet_trainer(max_epochs=2)
    trainer.fit(_progressive(rounds=2, trials=1, min_delta=None), datamodule=data)
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    longer = _progressive(rounds=4, trials=1, min_delta=None)
    quiet_trainer(max_epochs=4).fit(longer, datamodule=data, ckpt_path=tmp_path / "two.ckpt", weights_only=True)
    assert [ended.round for ended in longer.ended] == [1, 2, 3, 4]
    fewer = _progressive(rounds=1, trials=1, min_delta=None)
    with pytest.raises(UsageError, match=r"stages end after the steps \[3, 6\]; .* they end after \[12\]"):
        quiet_trainer(max_epochs=4).fit(fewer, datamodule=data, ckpt_path=tmp_path / "two.ckpt", weights_only=True)


def test_a_finished_chain_goes_on_with_more_rounds_on_the_command_line() -> None:
    run(["fit", *QUICK_PROGRESSIVE])
    cli = run(["fit", *QUICK_PROGRESSIVE, "--model.rounds=4", "--trainer.max_epochs=8", "--ckpt_path=last"])
    assert [ended.round for ended in cli.model.ended] == [1, 2, 3, 4]
    with pytest.raises(UsageError, match=r"--model\.rounds is 3, and the checkpoint has 4"):
        run(["fit", *QUICK_PROGRESSIVE, "--ckpt_path=last"])


def test_a_second_fit_begins_with_round_1_of_the_original() -> None:
    module = _progressive(rounds=2, trials=1, min_delta=None)
    for _ in range(2):
        _fit(module, 2)
        assert [ended.round for ended in module.ended] == [1, 2]
        first, second = module.ended
        assert first.recon_rmse == pytest.approx(first.round_rmse)
        assert second.recon_rmse != pytest.approx(second.round_rmse)


def test_the_representation_can_be_trained_on_after_a_fit() -> None:
    module = _progressive(rounds=1, trials=2)
    _fit(module, 1)
    representation = module.representation
    (representation.kernels() - representation.target).square().mean().backward()
    for parameter in representation.predictor.parameters():
        assert parameter.requires_grad
        assert parameter.grad is not None
        assert bool(parameter.grad.any())


@pytest.mark.parametrize("callback", [EMAWeightAveraging(), WeightAveraging()])
def test_callbacks_that_would_average_trials_are_refused(callback: Callback) -> None:
    trainer = quiet_trainer(max_epochs=1, callbacks=[callback])
    with pytest.raises(UsageError, match=rf"{type(callback).__name__} would average the representation over trials"):
        trainer.fit(_progressive(rounds=1), datamodule=DigitsDataModule(train_on="none", steps_per_epoch=2))


@pytest.mark.parametrize("value", [0, 0.0, -1.0])
def test_clipping_at_zero_is_no_clipping_as_in_lightning(value: float) -> None:
    torch.manual_seed(0)
    changed = []
    for options in ({}, {"gradient_clip_val": value}):
        torch.manual_seed(0)
        module = _progressive(rounds=1, trials=2)
        data = DigitsDataModule(train_on="none", steps_per_epoch=2)
        quiet_trainer(max_epochs=1, num_sanity_val_steps=0, **options).fit(module, datamodule=data)
        changed.append(module.trial_predictors.state_dict())
    assert all(torch.equal(value, changed[1][key]) for key, value in changed[0].items())
