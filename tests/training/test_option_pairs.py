"""Options that work alone must also work together, or be refused before the first step."""

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    Callback,
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelPruning,
    StochasticWeightAveraging,
    Timer,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import nernlit
from nernlit.cli.main import main
from nernlit.data import DigitsDataModule
from nernlit.errors import CheckpointError, DataError, UsageError
from nernlit.optimizers.ranger21 import Ranger21
from nernlit.originals import Original
from nernlit.predictors import MLP, Codebooks, Predictor, Quantize, Table
from nernlit.representation import Representation
from nernlit.storage.checkpoint import read_checkpoint
from nernlit.training import (
    BaselineJoint,
    DecoupledDistill,
    OriginalModule,
    Progressive,
    Rate,
    ReconOnly,
    ReconstructionPhase,
)
from nernlit.training.optimization import relative_rate
from tests.fakes import QUICK, quiet_trainer


def _adam(lr: float = 1e-3) -> Callable[[Iterator[nn.Parameter]], torch.optim.Optimizer]:
    return lambda parameters: torch.optim.Adam(parameters, lr=lr)


def _representation(predictor: Predictor | None = None, **options: object) -> Representation:
    torch.manual_seed(0)
    original = Original("digits_resnet8", pretrained=True)
    return Representation(original, predictor or MLP(8, depth=3), order="none", **options)  # type: ignore[arg-type]


class _Own(Table):
    """A user's predictor."""


class _OwnData(L.LightningDataModule):
    """A user's data module."""

    def __init__(self, classes: object) -> None:
        super().__init__()
        self.classes = classes

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(TensorDataset(torch.rand(4, 1, 8, 8), torch.zeros(4).long()), batch_size=2)


@pytest.mark.parametrize(
    ("options", "data", "message"),
    [
        ({"feature_weight": 1.0, "taps": ["nothing*"]}, {}, r"the tap 'nothing\*' matches no module"),
        (
            {"cross_entropy_weight": 0.1},
            {"train_on": "noise", "steps_per_epoch": 10},
            "cross_entropy_weight needs labels, but noise has none",
        ),
        ({"optimizer": _adam(-1.0)}, {}, r"--model.optimizer cannot be built: Invalid learning rate: -1"),
        ({"scheduler": torch.optim.lr_scheduler.ReduceLROnPlateau}, {}, "does not say which metric it follows"),
        (
            {"optimizer": lambda parameters: Ranger21(parameters, lr=1e-3), "tune_kept": "affine"},
            {},
            "Ranger21 has one",
        ),
        ({"optimizer": torch.optim.LBFGS, "on_divergence": "restart"}, {}, "restart does not work with .* LBFGS"),
    ],
)
def test_options_of_the_second_phase_are_refused_before_the_first(
    options: dict[str, object], data: dict[str, object], message: str
) -> None:
    options = {"optimizer": _adam(), **options}
    representation = _representation(tune_kept=options.pop("tune_kept", "none"))
    trainer = quiet_trainer(max_epochs=2)
    with pytest.raises(UsageError, match=message):
        trainer.fit(
            DecoupledDistill(representation, reconstruction=ReconstructionPhase(7, _adam()), **options),  # type: ignore[arg-type]
            datamodule=DigitsDataModule(batch_size=200, **data),  # type: ignore[arg-type]
        )
    assert trainer.global_step == 0


def test_changing_accumulation_is_refused() -> None:
    trainer = quiet_trainer(max_epochs=2, callbacks=[GradientAccumulationScheduler({0: 4})])
    with pytest.raises(UsageError, match="GradientAccumulationScheduler does not work here: schedules need a fixed"):
        trainer.fit(ReconOnly(_representation(), _adam()), datamodule=DigitsDataModule(batch_size=200))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"check_val_every_n_epoch": None}, "--trainer.check_val_every_n_epoch null: Progressive chooses"),
        ({"val_check_interval": 0.4}, "--trainer.val_check_interval 0.4: Progressive chooses"),
    ],
)
def test_rounds_that_do_not_end_with_a_validation_are_refused(options: dict[str, object], message: str) -> None:
    module = Progressive(_representation(), optimizer=_adam(), rounds=2, trials=1)
    with pytest.raises(UsageError, match=message):
        quiet_trainer(max_epochs=2, **options).fit(
            module, datamodule=DigitsDataModule(train_on="none", steps_per_epoch=5)
        )


def test_codes_move_in_a_fit_of_a_loaded_file(tmp_path: Path) -> None:
    codebooks = Codebooks(2, 4, iterations=3, move=0.1, move_rate=0.5)
    _representation(codebooks).save(tmp_path / "net.nern")
    loaded = nernlit.load(tmp_path / "net.nern")
    before = loaded.predictor.stored()["codes"].clone()
    module = DecoupledDistill(loaded, optimizer=_adam(1e-2), teacher=Original("digits_resnet8", pretrained=True))
    quiet_trainer(max_epochs=2).fit(module, datamodule=DigitsDataModule(batch_size=200))
    after = loaded.predictor.stored()["codes"]
    assert after.shape != before.shape or not torch.equal(after, before)


@pytest.mark.parametrize(
    ("classes", "names"),
    [
        (list(np.arange(10)), tuple(map(str, range(10)))),
        (np.array(list("abcdefghij")), tuple("abcdefghij")),
        (10, ()),
        ("ten", ()),
        (["a", "b"], ()),  # not those of the network
    ],
)
def test_class_names_of_any_type_leave_checkpoints_and_files_readable(
    classes: object, names: tuple[str, ...], tmp_path: Path
) -> None:
    module = ReconOnly(_representation(), _adam())
    trainer = quiet_trainer(max_steps=1)
    trainer.fit(module, datamodule=_OwnData(classes))
    assert module.representation.original.class_names == names
    trainer.save_checkpoint(tmp_path / "fit.ckpt")
    read_checkpoint(tmp_path / "fit.ckpt")
    module.representation.save(tmp_path / "net.nern")
    assert nernlit.load(tmp_path / "net.nern").original.class_names == names


def test_a_quantized_predictor_of_ones_own_starts_from_a_file(tmp_path: Path) -> None:
    options = {"quantize": Quantize(6.0)}
    written = _representation(_Own(), **options)
    written.save(tmp_path / "own.nern")
    module = DecoupledDistill(_representation(_Own(), **options), optimizer=_adam(), init_from=tmp_path / "own.nern")
    expected = written.reconstructed()
    assert all(torch.equal(value, expected[key]) for key, value in module.representation.reconstructed().items())


@pytest.mark.parametrize("train_on", ["noise", "none"])
def test_an_original_is_trained_on_labeled_images_only(train_on: str) -> None:
    module = OriginalModule(Original("digits_resnet8"), _adam())
    with pytest.raises(UsageError, match=f"--data.train_on {train_on}: OriginalModule is trained on labeled images"):
        quiet_trainer(max_epochs=1).fit(module, datamodule=DigitsDataModule(train_on=train_on, steps_per_epoch=2))  # type: ignore[arg-type]


def test_overfitting_a_few_batches_is_refused_by_name() -> None:
    with pytest.raises(UsageError, match=r"overfit_batches 2 is not supported; --trainer.limit_train_batches N"):
        quiet_trainer(max_epochs=1, overfit_batches=2).fit(
            ReconOnly(_representation(), _adam()), datamodule=DigitsDataModule(train_on="none", steps_per_epoch=2)
        )


@pytest.mark.parametrize("run", ["validate", "test"])
def test_several_data_loaders_are_refused(run: str) -> None:
    loader = DataLoader(TensorDataset(torch.rand(4, 1, 8, 8), torch.zeros(4).long()), batch_size=4)
    module = DecoupledDistill(_representation(), optimizer=_adam())
    with pytest.raises(UsageError, match=r"there are 2 (val|test) data loaders; expected 1"):
        getattr(quiet_trainer(), run)(module, [loader, loader], verbose=False)


def test_an_interval_between_validations_beyond_an_epoch_is_one_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fit", *QUICK, "--trainer.val_check_interval=300"])
    assert "--trainer.val_check_interval 300 is more than the 5 batches of an epoch" in capsys.readouterr().err


@pytest.mark.parametrize(
    "make",
    [
        lambda: ReconOnly(_representation(), _adam(), precision="fp16"),  # type: ignore[arg-type]
        lambda: ReconOnly(_representation(), _adam(), loss="rsme"),  # type: ignore[arg-type]
        lambda: BaselineJoint(_representation(), _adam(), gradients="some"),  # type: ignore[arg-type]
    ],
)
def test_unknown_names_of_options_are_refused_in_python_too(make: Callable[[], object]) -> None:
    with pytest.raises(UsageError, match=r"='(fp16|rsme|some)'; expected one of"):
        make()


def test_the_step_of_a_test_after_a_fit_is_that_of_the_fit() -> None:
    data = DigitsDataModule(train_on="none", steps_per_epoch=3)
    module = ReconOnly(_representation(), _adam())
    trainer = quiet_trainer(max_epochs=2)
    trainer.fit(module, datamodule=data)
    assert trainer.test(module, datamodule=data, verbose=False)[0]["step"] == 6


class _Validated(Callback):
    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_validation_end(self, trainer: object, pl_module: object) -> None:
        self.steps.append(trainer.global_step)  # type: ignore[attr-defined]


def test_a_stop_that_min_epochs_delays_does_not_add_validations() -> None:
    validated = _Validated()
    stopping = EarlyStopping("val/recon_rmse", patience=0, min_delta=10.0, verbose=False)
    quiet_trainer(
        max_epochs=20,
        min_epochs=8,
        check_val_every_n_epoch=3,
        num_sanity_val_steps=0,
        callbacks=[stopping, validated],
    ).fit(ReconOnly(_representation(), _adam()), datamodule=DigitsDataModule(train_on="none", steps_per_epoch=2))
    assert validated.steps[:2] == [6, 12]
    assert validated.steps[-1] == 16


@pytest.mark.parametrize(
    ("callback", "instead"),
    [
        (EarlyStopping("train/loss", check_on_train_epoch_end=True), "check_on_train_epoch_end: false"),
        (Timer(duration="00:00:10:00", interval="epoch"), "interval: step"),
    ],
)
def test_callbacks_that_stop_a_fit_without_a_last_validation_are_refused(callback: Callback, instead: str) -> None:
    data = DigitsDataModule(train_on="none", steps_per_epoch=2)
    with pytest.raises(UsageError, match=instead):
        quiet_trainer(max_epochs=4, check_val_every_n_epoch=3, callbacks=[callback]).fit(
            ReconOnly(_representation(), _adam()), datamodule=data
        )
    quiet_trainer(max_epochs=1, callbacks=[callback]).fit(ReconOnly(_representation(), _adam()), datamodule=data)


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (
            BatchSizeFinder(),
            r"BatchSizeFinder does not work here: pass a batch size \(--data\.batch_size\), and",
        ),
        (LearningRateFinder(), "LearningRateFinder does not work here: compare learning rates with `nernlit search`"),
        (BackboneFinetuning(), "BackboneFinetuning does not work here: the module chooses the parameters"),
        (
            StochasticWeightAveraging(1e-3),
            "StochasticWeightAveraging averages after the last validation and checkp",
        ),
        (ModelPruning("l1_unstructured"), "ModelPruning would prune the predictor's parameters after the last valid"),
        (ModelPruning("l1_unstructured", make_pruning_permanent=False), "would write checkpoints that cannot be read"),
    ],
)
def test_callbacks_that_do_not_work_with_a_scheme_are_refused(callback: Callback, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        quiet_trainer(max_epochs=1, callbacks=[callback]).fit(
            ReconOnly(_representation(), _adam()), datamodule=DigitsDataModule(train_on="none", steps_per_epoch=2)
        )


def test_averages_and_restarts_are_refused_together() -> None:
    module = ReconOnly(_representation(), _adam(), on_divergence="restart")
    with pytest.raises(UsageError, match="EMAWeightAveraging would average weights that a restart takes back"):
        quiet_trainer(max_epochs=1, callbacks=[EMAWeightAveraging()]).fit(
            module, datamodule=DigitsDataModule(train_on="none", steps_per_epoch=2)
        )


def test_a_checkpoint_of_another_class_is_refused(tmp_path: Path) -> None:
    data = DigitsDataModule(train_on="none", steps_per_epoch=2)
    trainer = quiet_trainer(max_epochs=1)
    trainer.fit(ReconOnly(_representation(), _adam()), datamodule=data)
    trainer.save_checkpoint(tmp_path / "recon.ckpt")
    message = "the checkpoint is of a ReconOnly, and this is a {0}; pass a checkpoint of a {0}"
    for module in (
        BaselineJoint(_representation(), _adam(), warmup_steps=1),
        Progressive(_representation(), optimizer=_adam(), rounds=1),
    ):
        with pytest.raises(CheckpointError, match=message.format(type(module).__name__)):
            quiet_trainer(max_epochs=2).test(module, data, ckpt_path=str(tmp_path / "recon.ckpt"), verbose=False)


@pytest.mark.parametrize("change", [lambda x: 255 * x, lambda x: x.fill_(torch.nan)], ids=["bytes", "nan"])
def test_training_images_that_are_no_pixels_are_refused(change: Callable[[Tensor], Tensor]) -> None:
    class Own(DigitsDataModule):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            images, *others = super().on_after_batch_transfer(batch, dataloader_idx)
            return (change(images) if self.trainer and self.trainer.training else images, *others)

    representation = _representation()
    for module in (BaselineJoint(representation, _adam()), OriginalModule(Original("digits_resnet8"), _adam())):
        with pytest.raises(DataError, match=r"the pixels of a batch are from .*; expected pixels in \[0, 1\]"):
            quiet_trainer(max_epochs=1).fit(module, datamodule=Own(train_on="images"))


def test_a_fit_without_a_logger_does_not_warn_about_each_metric() -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        quiet_trainer(max_epochs=1).fit(
            ReconOnly(_representation(), _adam()), datamodule=DigitsDataModule(train_on="none", steps_per_epoch=2)
        )
    assert not [each for each in seen if "no logger configured" in str(each.message)]


def test_calibration_lists_the_data_set_once_in_a_fit_without_training_images(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    built: list[str] = []
    build = DigitsDataModule.build

    def counted(self: DigitsDataModule, split: Any) -> Any:
        built.append(split)
        return build(self, split)

    monkeypatch.setattr(DigitsDataModule, "build", counted)
    module = ReconOnly(_representation(tune_kept="affine"), _adam(), calibration_images=8)
    data = DigitsDataModule(train_on="none", steps_per_epoch=2)
    trainer = quiet_trainer(max_epochs=4)
    trainer.fit(module, datamodule=data)
    assert built.count("train") == 2  # to split off the validation images, and to calibrate


def test_learning_rates_are_relative_to_the_highest() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(()))], lr=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10)
    rates = []
    for _ in range(10):
        rates.append(relative_rate(optimizer))
        optimizer.step()
        schedule.step()
    assert max(rates) == pytest.approx(1.0)


def test_kept_tensors_that_become_different_numbers_are_counted_by_the_rate() -> None:
    representation = _representation(Table(scale="layer"), quantize=Quantize(2.0), tune_kept="affine")
    target = representation.sizes().file_bytes + 500
    module = DecoupledDistill(representation, optimizer=_adam(1e-2), rate=Rate(target_bytes=target))
    trainer = quiet_trainer(max_epochs=40)
    trainer.fit(module, datamodule=DigitsDataModule(batch_size=400))
    estimate = float(trainer.callback_metrics["size/file_bytes_estimate"])
    assert representation.sizes().file_bytes == pytest.approx(estimate, rel=0.01)


def test_class_names_that_a_network_has_are_compared_and_kept(tmp_path: Path) -> None:
    names = tuple("abcdefghij")
    representation = _representation()
    representation.original.class_names = names
    quiet_trainer(max_steps=1).fit(ReconOnly(representation, _adam()), datamodule=_OwnData(list(names)))
    with pytest.raises(
        DataError, match=r"in another order \(b, a, c, d and 6 more\) than the network's \(a, b, c, d and 6 more\)"
    ):
        quiet_trainer(max_steps=1).fit(ReconOnly(representation, _adam()), datamodule=_OwnData(list("bacdefghij")))
    with pytest.warns(
        UserWarning, match=r"\(0, 1, 2, 3 and 6 more\) are not named as the network's \(a, b, c, d and 6 more\)"
    ):
        quiet_trainer(max_steps=1).fit(ReconOnly(representation, _adam()), datamodule=_OwnData(range(10)))
    assert representation.original.class_names == names
    trainer, module = quiet_trainer(max_steps=1), ReconOnly(representation, _adam())
    trainer.fit(module, datamodule=_OwnData(names))
    trainer.save_checkpoint(tmp_path / "fit.ckpt")
    unnamed = ReconOnly(_representation(), _adam())
    with pytest.raises(DataError, match="in another order"):
        quiet_trainer(max_steps=2).fit(unnamed, datamodule=_OwnData(names[::-1]), ckpt_path=tmp_path / "fit.ckpt")


def test_a_resumed_fit_has_the_same_validation_images_and_seed(capsys: pytest.CaptureFixture[str]) -> None:
    main(["fit", *QUICK, "--trainer.max_epochs=1", "--seed_everything=3"])
    resumed = ["fit", *QUICK, "--ckpt_path=last"]
    for option, message in (
        ("--data.split_seed=5", "--data.split_seed 5: the fit was started with 0"),
        ("--data.val_share=0.5", "--data.val_share 0.5: the fit was started with 0.1"),
        ("--seed_everything=4", "is of a fit with seed 3; leave it out"),
    ):
        with pytest.raises(SystemExit):
            main([*resumed, option])
        assert message in capsys.readouterr().err
    main(resumed)
    (config,) = Path("runs").rglob("config.yaml")
    assert "seed_everything: 3" in config.read_text()
