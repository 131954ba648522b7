from collections.abc import Iterator

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.data import DataLoader

from nernlit.data import DigitsDataModule
from nernlit.errors import UsageError
from nernlit.kernels import AllKernels, MagnitudeMix, Uniform
from nernlit.originals import Original
from nernlit.predictors import MLP
from nernlit.representation import Representation
from nernlit.training import BaselineJoint
from nernlit.training.baseline_joint import JointObjective
from tests.fakes import in_double, quiet_trainer
from tests.reference import joint


def _adam(params: Iterator[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, lr=1e-3)


def _representation() -> Representation:
    torch.manual_seed(0)
    predictor = MLP(6, depth=3, num_frequencies=4)
    return Representation(Original("digits_resnet8", pretrained=True), predictor, standardize=False)


def _objective(module: BaselineJoint) -> JointObjective:
    objective = module.stages[0].objective
    assert isinstance(objective, JointObjective)
    return objective


class _Gradients(L.Callback):
    """Keep the first step's gradients."""

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: object) -> None:
        assert isinstance(pl_module, BaselineJoint)
        self.gradients = [p.grad.clone() for p in pl_module.trained_parameters() if p.grad is not None]


def _first_step(module: BaselineJoint, images: torch.Tensor) -> tuple[dict[str, float], list[torch.Tensor]]:
    keep = _Gradients()
    batch = [(images, torch.zeros(len(images), dtype=torch.long))]
    trainer = quiet_trainer(max_steps=1, callbacks=[keep])
    trainer.fit(module, DataLoader(batch, batch_size=None))  # type: ignore[arg-type]
    terms = {name: float(trainer.callback_metrics[f"train/{name}"]) for name in ("recon", "features", "kd")}
    return terms, keep.gradients


@pytest.mark.parametrize("gradients", ["sampled", "all"])
def test_a_whole_step_equals_the_slow_reference(gradients: str) -> None:
    representation = in_double(_representation())  # in fp32 rounding alone is 1e-5
    weights = (1.0, 1e-2, 0.5)
    module = BaselineJoint(
        representation,
        _adam,
        sampling=MagnitudeMix(300, uniform_share=0.0),  # with replacement: some kernels are drawn twice
        gradients=gradients,  # type: ignore[arg-type]
        recon_weight=weights[0],
        feature_weight=weights[1],
        kd_weight=weights[2],
    )
    rows = _objective(module).reconstruction.sampling.indices(module.norms_N, module.seed, 0).tolist()
    assert len(set(rows)) < len(rows)
    everything = range(representation.layout.num_kernels)
    images = torch.rand(3, 1, 8, 8, dtype=torch.float64)
    expected, expected_gradients = joint.step(
        representation.original.net.state_dict(),
        [tuple(address) for address in representation.addresses.tolist()],
        list(representation.predictor.parameters()),
        set(rows if gradients == "sampled" else everything),
        images,
        weights,
        num_frequencies=4,
        base=0.76,
    )
    terms, got_gradients = _first_step(module, images)
    for name, value in terms.items():
        assert value == pytest.approx(float(expected[name]), rel=1e-5), name
    for got, right in zip(got_gradients, expected_gradients, strict=True):
        assert float((got - right).norm() / right.norm()) < 1e-5


def test_defaults_are_nerns() -> None:
    module = BaselineJoint(_representation(), _adam)
    objective = _objective(module)
    distillation, sampling = objective.distillation, objective.reconstruction.sampling
    weights = (objective.recon_weight, distillation.feature_weight, distillation.kd_weight)
    assert weights == (1.0, 1e-4, 1e-4)
    assert (distillation.temperature, distillation.kd_inside_log) == (1.0, 1e-4)
    assert isinstance(sampling, MagnitudeMix)
    assert (sampling.batch_size, sampling.uniform_share) == (4096, 0.8)
    assert (objective.gradients, objective.warmup_steps, module.precision) == ("sampled", 0, "fp32")


def _cnn_runs(**options: object) -> list[int]:
    """How often the CNN runs in each of three steps."""
    representation = _representation()
    module = BaselineJoint(representation, _adam, sampling=Uniform(16), **options)  # type: ignore[arg-type]
    seen: list[int] = []

    def note(cnn: nn.Module, _inputs: object, output: object) -> None:
        if isinstance(cnn, Original) and isinstance(output, torch.Tensor) and len(output) == 8:  # not two, to fold
            seen.append(module.trainer.global_step)

    data = DigitsDataModule(batch_size=8)
    with register_module_forward_hook(note):
        quiet_trainer(max_steps=3, limit_val_batches=0).fit(module, datamodule=data)
    return [seen.count(step) for step in range(3)]


def test_terms_of_weight_zero_cost_nothing() -> None:
    assert _cnn_runs() == [2, 2, 2]  # student, and original for maps and logits
    assert _cnn_runs(feature_weight=0.0) == [2, 2, 2]
    assert _cnn_runs(kd_weight=0.0) == [2, 2, 2]
    assert _cnn_runs(feature_weight=0.0, kd_weight=0.0) == [0, 0, 0]


def test_no_image_is_looked_at_before_the_warm_up_is_over() -> None:
    assert _cnn_runs(warmup_steps=2) == [0, 0, 2]


def test_the_warm_up_is_recon_only_in_weight_units() -> None:
    representation = _representation()
    module = BaselineJoint(representation, _adam, sampling=AllKernels(), warmup_steps=1)
    expected = (representation.kernels() - representation.target).square().mean().sqrt()
    data = DigitsDataModule(batch_size=8)
    seen: list[dict[str, float]] = []
    note = LambdaCallback(on_train_batch_end=lambda trainer, *_: seen.append(dict(trainer.callback_metrics)))
    quiet_trainer(max_steps=2, limit_val_batches=0, callbacks=[note]).fit(module, datamodule=data)
    assert float(seen[0]["train/recon"]) == pytest.approx(float(expected.detach()), rel=1e-5)
    assert "train/kd" not in seen[0]
    assert "train/kd" in seen[1]
    with pytest.raises(UsageError, match=r"the run ends after 1 steps, within the loss warm-up \(warmup_steps=1\)"):
        quiet_trainer(max_steps=1).fit(module, datamodule=data)


def test_a_step_with_nothing_to_learn_is_refused() -> None:
    for options in ({"feature_weight": 0.0, "kd_weight": 0.0}, {"warmup_steps": 10}):
        with pytest.raises(UsageError, match="some steps have nothing to learn"):
            BaselineJoint(_representation(), _adam, recon_weight=0.0, **options)  # type: ignore[arg-type]


def test_without_terms_of_images_it_is_recon_only() -> None:
    module = BaselineJoint(_representation(), _adam, feature_weight=0.0, kd_weight=0.0)
    assert not module.trains_on_images
    quiet_trainer(max_steps=1).fit(module, datamodule=DigitsDataModule(train_on="none"))


def test_data_without_images_is_refused() -> None:
    with pytest.raises(UsageError, match=r"BaselineJoint needs images; pass --data.train_on images \(or noise\)"):
        quiet_trainer(max_steps=1).fit(
            BaselineJoint(_representation(), _adam), datamodule=DigitsDataModule(train_on="none")
        )
