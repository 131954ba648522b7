from collections.abc import Iterator

import pytest
import torch
from torch.utils.data import DataLoader

from nernlit.data import DigitsDataModule
from nernlit.errors import DataError, UsageError
from nernlit.kernels import AllKernels, Uniform
from nernlit.originals import Original
from nernlit.predictors import MLP
from nernlit.representation import Representation
from nernlit.training import ReconOnly
from tests.fakes import UntouchableCNN, quiet_trainer, tiny_representation


def _adam(params: Iterator[torch.nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, lr=1e-2)


def _steps(count: int) -> DataLoader[int]:
    return DataLoader(range(count), batch_size=None)  # type: ignore[arg-type]


def test_a_training_step_never_runs_the_cnn() -> None:
    original = Original.from_module(UntouchableCNN(), 10, [0.5], [0.5])
    module = ReconOnly(Representation(original, MLP(8, num_frequencies=4)), _adam, sampling=Uniform(8))
    quiet_trainer(max_steps=3).fit(module, _steps(3))


def test_a_step_predicts_only_the_kernels_that_it_sampled() -> None:
    representation = tiny_representation()
    asked = []
    representation.predictor.register_forward_pre_hook(lambda _, inputs: asked.append(len(inputs[0])))
    quiet_trainer(max_steps=4).fit(ReconOnly(representation, _adam, sampling=Uniform(7)), _steps(4))
    assert asked == [7] * 4


@pytest.mark.parametrize("loss", ["mse", "rmse"])
def test_the_loss_is_the_error_in_units_of_the_scale(loss: str) -> None:
    representation = tiny_representation()
    module = ReconOnly(representation, _adam, sampling=AllKernels(), loss=loss)  # type: ignore[arg-type]
    mask = representation.learned.mask()
    errors = ((representation.kernels() - representation.target) / representation.scale)[mask]
    expected = errors.square().mean().detach()
    trainer = quiet_trainer(max_steps=1)
    trainer.fit(module, _steps(1))
    reported = trainer.callback_metrics["train/recon"]
    assert float(reported) == pytest.approx(float(expected if loss == "mse" else expected.sqrt()), rel=1e-5)


def test_validation_reports_both_networks_on_the_same_images() -> None:
    representation = Representation(Original("digits_resnet8", pretrained=True), MLP(8))
    module = ReconOnly(representation, _adam)
    data = DigitsDataModule(train_on="none", steps_per_epoch=2)
    trainer = quiet_trainer(max_epochs=2)
    trainer.fit(module, datamodule=data)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    source = data.sources["val"]
    images, labels = source[list(range(len(source)))]
    representation.eval()
    for suffix, network in (("", representation), ("_original", representation.original)):
        with torch.no_grad():
            logits = network(images.float() / 255)
        top5 = (logits.topk(5).indices == labels[:, None]).any(1)
        assert metrics[f"val/acc{suffix}"] == pytest.approx(float((logits.argmax(1) == labels).float().mean()))
        assert metrics[f"val/acc_top5{suffix}"] == pytest.approx(float(top5.float().mean()))
    difference = representation.kernels() - representation.target
    assert metrics["val/recon_rmse"] == pytest.approx(float(difference.square().mean().sqrt()), rel=1e-5)
    explained = 1 - difference.square().sum() / representation.target.square().sum()
    assert metrics["val/explained_power"] == pytest.approx(float(explained), rel=1e-4)


def test_an_evaluation_predicts_every_kernel_once() -> None:
    representation = Representation(Original("digits_resnet8", pretrained=True), MLP(8))
    asked = []
    representation.predictor.register_forward_pre_hook(lambda _, inputs: asked.append(len(inputs[0])))
    data = DigitsDataModule(train_on="none", eval_batch_size=10)
    quiet_trainer().validate(ReconOnly(representation, _adam), datamodule=data, verbose=False)
    assert asked == [representation.layout.num_kernels]


def test_the_original_is_measured_once() -> None:
    representation = Representation(Original("digits_resnet8", pretrained=True), MLP(8))
    seen = []
    representation.original.register_forward_hook(lambda *_: seen.append(1))
    trainer = quiet_trainer(max_epochs=3, num_sanity_val_steps=0)
    trainer.fit(ReconOnly(representation, _adam), datamodule=DigitsDataModule(train_on="none", steps_per_epoch=1))
    reconstructed_runs, original_runs = 3, 1
    assert len(seen) == reconstructed_runs + original_runs
    assert "val/acc_original" in trainer.callback_metrics


def test_another_run_measures_the_original_anew() -> None:
    module, wrong = ReconOnly(Representation(Original("digits_resnet8", pretrained=True), MLP(8)), _adam), []
    data = DigitsDataModule(train_on="none")
    for shift in (0, 1):
        trainer = quiet_trainer()
        module.representation.original.register_forward_hook(lambda _m, _in, out, shift=shift: out.roll(shift, 1))
        trainer.validate(module, datamodule=data, verbose=False)
        wrong.append(1 - float(trainer.callback_metrics["val/acc_original"]))
    assert wrong[0] < 0.1 < 0.9 < wrong[1]  # with its answers shifted by a class


def test_data_with_other_classes_and_untrained_originals_are_refused() -> None:
    original = Original("digits_resnet8", num_classes=7)
    with pytest.raises(UsageError, match="'digits_resnet8' has random weights"):
        ReconOnly(Representation(original, MLP(8)), _adam)
    original.weights_from = "a test"
    module = ReconOnly(Representation(original, MLP(8)), _adam)
    with pytest.raises(DataError, match="DigitsDataModule has 10 classes, but the original has 7"):
        quiet_trainer(max_steps=1).fit(module, datamodule=DigitsDataModule(train_on="none"))


def test_endless_runs_with_a_schedule_are_refused() -> None:
    from nernlit.optimizers import WarmupCosine

    module = ReconOnly(tiny_representation(), _adam, WarmupCosine)
    with pytest.raises(UsageError, match="the number of training steps is unlimited"):
        quiet_trainer(max_epochs=-1).fit(module, _steps(1))
