"""In one Python process: fits after fits that raised, and modules, data and files used in the next call."""

import copy
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, CyclicLR, OneCycleLR, StepLR
from torch.utils.data import DataLoader, TensorDataset

import nernlit
from nernlit.analysis.rivals import factorized
from nernlit.callbacks import AdversarialAccuracy, Throughput
from nernlit.data import DigitsDataModule, NoImages
from nernlit.errors import DataError, NernlitError, UsageError
from nernlit.originals import Original
from nernlit.predictors import MLP, Quantize, Table
from nernlit.representation import Representation
from nernlit.training import DecoupledDistill, OriginalModule, Progressive, ReconOnly, ReconstructionPhase
from tests.fakes import PowerCut, digits_representation, quiet_trainer


def _adam(params: Iterator[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, lr=1e-2)


def _images() -> DigitsDataModule:
    return DigitsDataModule(batch_size=500, val_share=0.2)


def _interrupted(module: L.LightningModule, before_batch: int = 1, **options: Any) -> None:
    with pytest.raises(ConnectionAbortedError):
        quiet_trainer(max_epochs=4, callbacks=[PowerCut(before_batch)], **options).fit(module, datamodule=NoImages(2))


def _progressive(**options: Any) -> Progressive:
    torch.manual_seed(0)
    return Progressive(digits_representation(), optimizer=_adam, **{"rounds": 2, "trials": 1, **options})


def test_after_a_progressive_fit_that_raised_the_predictor_is_trainable_and_the_next_fit_starts_anew() -> None:
    module, fresh = _progressive(), _progressive()
    _interrupted(module)
    assert all(each.requires_grad for each in module.representation.predictor.parameters())
    for each in (module, fresh):
        quiet_trainer(max_epochs=4).fit(each, datamodule=NoImages(2))
    assert len(module.ended) == 2
    for own, other in zip(module.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(own, other)


def test_progressive_ends_early_without_callbacks() -> None:
    module = _progressive(rounds=3, min_delta=1e9)
    trainer = quiet_trainer(max_epochs=3)
    trainer.fit(module, datamodule=NoImages(2))
    assert [each.improved for each in module.ended] == [True, False]
    assert trainer.global_step == 4


def test_fits_that_end_before_their_last_stage_say_so() -> None:
    phase = ReconstructionPhase(3, _adam)
    module = DecoupledDistill(digits_representation(), optimizer=_adam, reconstruction=phase)
    stop = L.pytorch.callbacks.EarlyStopping("val/recon_rmse", patience=1, min_delta=10.0, verbose=False)
    with pytest.warns(UserWarning, match="ended in phase 1, after 2 of its 3 steps, so nothing was distilled"):
        quiet_trainer(max_epochs=4, callbacks=[stop], limit_train_batches=1).fit(module, datamodule=_images())
    with pytest.warns(UserWarning, match="The fit ended within round 1, so the weights are those of an unfinished fit"):
        quiet_trainer(max_epochs=4, max_steps=3).fit(_progressive(), datamodule=NoImages(2))


def test_data_of_an_earlier_call_is_not_used() -> None:
    module, trainer = (
        ReconOnly(digits_representation(), _adam),
        quiet_trainer(max_epochs=1, callbacks=[AdversarialAccuracy()]),
    )
    trainer.fit(module, datamodule=NoImages(2))
    images = DataLoader(TensorDataset(torch.rand(8, 1, 8, 8), torch.arange(8)), batch_size=4)
    assert "test/acc" in trainer.test(module, dataloaders=images, verbose=False)[0]


def test_a_fitted_representation_needs_no_phase_1() -> None:
    representation = digits_representation()
    quiet_trainer(max_epochs=1).fit(ReconOnly(representation, _adam), datamodule=NoImages(2))
    module = DecoupledDistill(representation, optimizer=_adam)
    quiet_trainer(max_epochs=1, limit_train_batches=1).fit(module, datamodule=_images())


def test_a_fit_that_raised_before_its_first_step_leaves_a_new_predictor_new() -> None:
    representation = digits_representation()

    class Fails(L.Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            raise ConnectionAbortedError

    with pytest.raises(ConnectionAbortedError):
        quiet_trainer(max_epochs=1, callbacks=[Fails()]).fit(ReconOnly(representation, _adam), datamodule=NoImages(2))
    assert representation.is_new
    quiet_trainer(max_epochs=1).fit(ReconOnly(representation, _adam), datamodule=NoImages(2))
    assert not representation.is_new


def test_a_file_alone_is_not_its_own_teacher(tmp_path: Path) -> None:
    original = Original("digits_resnet8", pretrained=True)
    Representation(original, Table((3, 3)), order="none", quantize=Quantize(4.0)).save(tmp_path / "a.nern")
    module = DecoupledDistill(nernlit.load(tmp_path / "a.nern"), optimizer=_adam)
    with pytest.raises(UsageError, match="the student would be its own teacher"):
        quiet_trainer(max_epochs=1).fit(module, datamodule=_images())


def test_an_optimizer_may_have_groups_of_its_own() -> None:
    def grouped(parameters: Any) -> torch.optim.Optimizer:
        matrices = [each for each in parameters if each.ndim > 1]
        vectors = [each for each in parameters if each.ndim < 2]
        groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.1)

    trainer = quiet_trainer(max_epochs=1)
    trainer.fit(ReconOnly(digits_representation(), grouped), datamodule=NoImages(2))
    assert [group["weight_decay"] for group in trainer.optimizers[0].param_groups] == [0.1, 0.0]
    original = Original("digits_resnet8", pretrained=True)
    rounded = Representation(original, MLP(8), order="none", quantize=Quantize(4.0))
    with pytest.raises(UsageError, match=r"optimizer cannot be built: 'dict' object has no attribute 'ndim'"):
        quiet_trainer(max_epochs=1).fit(ReconOnly(rounded, grouped), datamodule=NoImages(2))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda optimizer: StepLR(optimizer, 0), "scheduler StepLR fails after step 1"),
        (lambda optimizer: CosineAnnealingLR(optimizer, 0), "scheduler CosineAnnealingLR fails after step 1"),
        (lambda optimizer: CyclicLR(optimizer, 0.1, 0.2, step_size_up=0), "scheduler cannot be built"),
        (lambda optimizer: OneCycleLR(optimizer, 0.1, total_steps=2), "total_steps=2, but the fit has 4 steps"),
        (lambda optimizer: None, "scheduler made a NoneType; expected a torch"),
    ],
)
def test_schedules_that_cannot_step_are_refused(make: Any, message: str) -> None:
    module = ReconOnly(digits_representation(), lambda params: torch.optim.SGD(params, 0.1, momentum=0.9), make)
    with pytest.raises(UsageError, match=message):
        quiet_trainer(max_epochs=2).fit(module, datamodule=NoImages(2))


def test_an_original_trained_in_this_process_has_trained_weights() -> None:
    original = Original("digits_resnet8")
    quiet_trainer(max_epochs=1).fit(OriginalModule(original, optimizer=_adam), datamodule=_images())
    module = ReconOnly(Representation(original, MLP(8, num_frequencies=4), order="none"), _adam)
    quiet_trainer(max_epochs=1).fit(module, datamodule=NoImages(2))


def test_inputs_that_are_no_pixels_are_refused() -> None:
    representation = digits_representation()
    bytes_ = torch.randint(0, 255, (4, 1, 8, 8), dtype=torch.uint8)
    with pytest.raises(DataError, match=r"the images are uint8; expected pixels in \[0, 1\], so divide bytes by 255"):
        representation.original(bytes_)
    with pytest.raises(DataError, match="has 3 channels; 'digits_resnet8' takes 1"):
        nernlit.calibrate(_tunable(), [torch.rand(4, 3, 8, 8)])
    plain = Original.from_module(nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3)))
    named = Representation(plain, MLP(8, num_frequencies=4), order="none", tune_kept="affine")
    with pytest.raises(UsageError, match="calibration"):
        nernlit.calibrate(named, [torch.rand(4, 1, 8, 8)])


def _tunable() -> Representation:
    original = Original("digits_resnet8", pretrained=True)
    return Representation(original, MLP(8, num_frequencies=4), order="none", tune_kept="affine")


def test_a_checkpoint_is_tested_with_other_training_options(tmp_path: Path) -> None:
    module, trainer = ReconOnly(digits_representation(), _adam), quiet_trainer(max_epochs=1)
    trainer.fit(module, datamodule=DigitsDataModule(train_on="none", steps_per_epoch=2))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    data = DigitsDataModule(val_share=0.2)
    found = quiet_trainer().test(module, data, ckpt_path=tmp_path / "a.ckpt", weights_only=True, verbose=False)
    assert "test/acc" in found[0]


def test_a_fit_after_one_that_could_not_be_resumed_starts_anew(tmp_path: Path) -> None:
    other = ReconOnly(digits_representation(16), _adam)
    trainer = quiet_trainer(max_epochs=5)
    trainer.fit(other, datamodule=NoImages(2))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    module = ReconOnly(digits_representation(), _adam)
    seed = module.seed
    with pytest.raises((NernlitError, RuntimeError)):
        quiet_trainer(max_epochs=6).fit(
            module, datamodule=NoImages(2), ckpt_path=tmp_path / "a.ckpt", weights_only=True
        )
    quiet_trainer(max_epochs=1).fit(module, datamodule=NoImages(2))
    assert module.seed == seed


def test_a_resumed_fit_has_epochs_of_the_same_length(tmp_path: Path) -> None:
    module, trainer = ReconOnly(digits_representation(), _adam), quiet_trainer(max_epochs=1)
    trainer.fit(module, datamodule=NoImages(4))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    for options, data in (({}, NoImages(8)), ({"accumulate_grad_batches": 2}, NoImages(4))):
        with pytest.raises(UsageError, match="an epoch of the checkpoint's fit had 4 optimizer steps"):
            quiet_trainer(max_epochs=2, **options).fit(
                ReconOnly(digits_representation(), _adam), data, ckpt_path=tmp_path / "a.ckpt", weights_only=True
            )


def test_a_representation_that_was_saved_for_the_hub_can_be_copied(tmp_path: Path) -> None:
    representation = digits_representation()
    representation.save_pretrained(tmp_path / "hub")
    copied = copy.deepcopy(representation)
    assert pickle.loads(pickle.dumps(representation)).predictor.num_params == copied.predictor.num_params


def test_the_parts_of_the_package_are_attributes_in_a_fresh_process() -> None:
    code = "import nernlit; print(nernlit.analysis.__name__, nernlit.data.__name__, 'callbacks' in dir(nernlit))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "nernlit.analysis nernlit.data True\n"


def test_a_plain_network_as_a_teacher_is_refused() -> None:
    with pytest.raises(UsageError, match="teacher is a Sequential; pass an Original"):
        DecoupledDistill(digits_representation(), optimizer=_adam, teacher=nn.Sequential())  # type: ignore[arg-type]


def test_without_a_trainer_each_pass_has_an_order_of_its_own() -> None:
    data = _images()
    with pytest.raises(UsageError, match=r'the train images are not set up; call setup\("fit"\)'):
        data.train_dataloader()
    with pytest.raises(UsageError, match=r'the test images are not set up; call setup\("test"\)'):
        data.test_dataloader()
    data.setup("fit")
    loader = data.train_dataloader()
    first, second = (torch.cat([labels for _, labels in loader]) for _ in range(2))
    assert not torch.equal(first, second)


def test_throughput_removes_its_hooks_after_an_exception() -> None:
    module, callback = ReconOnly(digits_representation(), _adam), Throughput(1)
    with pytest.raises(ConnectionAbortedError):
        quiet_trainer(max_epochs=2, callbacks=[callback, PowerCut(1)]).fit(module, datamodule=NoImages(2))
    assert not module.representation.predictor._forward_pre_hooks


def test_compress_passes_ctrl_c_on() -> None:
    net = Original("digits_resnet8", pretrained=True).net

    class Stops:
        passes = 0

        def __iter__(self) -> Iterator[Tensor]:
            self.passes += 1
            yield torch.rand(2, 1, 8, 8)
            if self.passes > 1:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        nernlit.compress(net, Stops(), steps=3)  # type: ignore[arg-type]


def test_an_evaluation_keeps_the_last_values_beside_the_average() -> None:
    phase = ReconstructionPhase(1, _adam)
    module = DecoupledDistill(digits_representation(), optimizer=_adam, reconstruction=phase, ema=0.9)
    trainer = quiet_trainer(max_epochs=1)
    trainer.fit(module, datamodule=_images())
    before = {name: value.clone() for name, value in module.average.others.items()}
    assert before
    trainer.test(module, datamodule=_images(), verbose=False)
    assert all(torch.equal(value, module.average.others[name]) for name, value in before.items())


def test_intervals_are_restored_after_an_exception_in_the_last_validation() -> None:
    module = ReconOnly(digits_representation(), _adam)

    class Fails(L.Callback):
        def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            raise ConnectionAbortedError

    failing = Fails()
    options: dict[str, Any] = {"max_epochs": 4, "check_val_every_n_epoch": 4, "num_sanity_val_steps": 0}
    trainer = quiet_trainer(**options, max_steps=3, min_epochs=2, callbacks=[failing])
    with pytest.raises(ConnectionAbortedError):
        trainer.fit(module, datamodule=NoImages(2))
    other = quiet_trainer(max_epochs=2, check_val_every_n_epoch=2)
    other.fit(copy.deepcopy(module), datamodule=NoImages(2))
    assert other.check_val_every_n_epoch == 2
    trainer.callbacks.remove(failing)
    trainer.fit_loop.epoch_loop.max_steps = 4
    trainer.fit(module, datamodule=NoImages(2))
    assert (trainer.check_val_every_n_epoch, trainer.fit_loop.min_epochs) == (4, 2)


def test_a_module_can_be_fine_tuned_and_unknown_weights_are_refused() -> None:
    net = digits_representation().module()
    assert all(parameter.requires_grad for parameter in net.parameters())
    with pytest.raises(UsageError, match=r"the state dict has no 'conv1\.wieght'"):
        factorized(net.state_dict(), ["conv1.wieght"], 0.3)
