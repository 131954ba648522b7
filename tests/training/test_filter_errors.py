"""`sensitivity: kronecker`: the errors of a filter's weights count together."""

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from nernlit.data import DigitsDataModule
from nernlit.errors import CheckpointError, DataError, UsageError
from nernlit.kernels import AllKernels, Layout, MagnitudeMix, Sampling, Uniform
from nernlit.originals import Factors, Original
from nernlit.predictors import MLP, Codebooks, PredictorEnsemble
from nernlit.representation import Representation
from nernlit.training import (
    BaselineJoint,
    DecoupledDistill,
    Progressive,
    ReconOnly,
    Reconstruction,
    ReconstructionPhase,
    Sensitivity,
    Step,
)
from nernlit.training.error_weights import ErrorWeights
from nernlit.training.filter_errors import FilterErrors, filter_weights
from nernlit.training.objectives import full_reconstruction_error
from tests.fakes import digits_representation, quiet_trainer

KRONECKER = Sensitivity("kronecker", exponent=0.5, num_images=16)
SHAPES = {"a.weight": (3, 2, 3, 3), "b.weight": (4, 3, 1, 1), "c.weight": (2, 4, 3, 3), "d.weight": (3, 2, 3, 3)}


def _adam(params: Iterator[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, lr=1e-2)


def _factors() -> tuple[Layout, dict[str, Factors]]:
    generator, found = torch.Generator().manual_seed(0), {}
    for key, (outputs, *inputs) in SHAPES.items():
        pair = []
        for side in (outputs, torch.Size(inputs).numel()):
            root = torch.randn(side, side + 2, generator=generator, dtype=torch.float64)
            pair.append(root @ root.T)
        found[key] = Factors(*pair)
    return Layout(list(SHAPES.items())), found


def _power(matrix: Tensor, exponent: float) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ values.pow(exponent).diag() @ vectors.T


@pytest.mark.parametrize("exponent", [0.35, 1.0])
def test_the_error_is_a_trace_in_units_of_independent_errors(exponent: float) -> None:
    layout, factors = _factors()
    errors = FilterErrors(layout, filter_weights(layout, factors, exponent))
    differences = {key: torch.randn(shape) for key, shape in SHAPES.items()}
    found, expected = 0.0, 0.0
    for key, (outputs, inputs) in factors.items():
        weights, power = outputs.diagonal().pow(exponent).diag(), _power(inputs, exponent)
        change = differences[key].flatten(1).double()
        found += float(torch.trace(weights @ change @ power @ change.T))
        expected += float(torch.trace(weights) * torch.trace(power))
    assert float(errors.all(differences)) == pytest.approx(found / expected, rel=1e-4)
    table = layout.table(differences)
    (sample,) = errors.sample(AllKernels(), table.flatten(1).norm(dim=1), 0, 0, 1)
    rows = errors.rows(sample)
    assert torch.equal(rows.sort().values, torch.arange(layout.num_kernels))
    assert float(errors(table[rows], sample)) == pytest.approx(found / expected, rel=1e-4)


@pytest.mark.parametrize("sampling", [Uniform(6), MagnitudeMix(6), AllKernels()])
@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_every_step_has_filters_of_each_layer_and_each_has_its_part(sampling: Sampling, world_size: int) -> None:
    layout, factors = _factors()
    weights = filter_weights(layout, factors, 0.5)
    errors = FilterErrors(layout, weights)
    table = torch.randn(layout.num_kernels, 3, 3)
    samples = errors.sample(sampling, table.flatten(1).norm(dim=1), 1, 3, world_size)
    rows = torch.cat([errors.rows(sample) for sample in samples])
    expected = 0.0
    for layer in layout.layers:
        own = [row - layer.rows.start for row in rows.tolist() if layer.rows.start <= row < layer.rows.stop]
        filters, channels = layer.grid
        counts = torch.tensor(own).bincount(minlength=layer.kernels).view(filters, channels)
        assert counts.sum() > 0
        assert torch.equal(counts, counts[:, :1].expand(filters, channels))  # whole filters
        weights_O, root_DD = weights[layer.key]
        errors_OD = table[layer.rows][:, *layer.crop((3, 3))].reshape(filters, -1)
        of_filters = weights_O * (errors_OD @ root_DD).square().sum(1)
        expected += float((counts[:, 0] * of_filters).sum()) * filters / float(counts[:, 0].sum())
    parts = [errors(table[errors.rows(sample)], sample) for sample in samples]
    assert float(torch.stack(parts).sum()) == pytest.approx(expected, rel=1e-4)


def test_filters_are_drawn_by_their_norms() -> None:
    layout, factors = _factors()
    errors = FilterErrors(layout, filter_weights(layout, factors, 0.5))
    norms = torch.zeros(layout.num_kernels)
    for layer in layout.layers:
        norms[layer.rows.start + layer.grid[1]] = 1.0  # of the second filter
    (sample,) = errors.sample(MagnitudeMix(6, uniform_share=0.0), norms, 1, 3, 1)
    assert all(bool((filters == 1).all()) for filters in sample.filters)


def _step(representation: Representation, errors: FilterErrors, rank: int = 0, world_size: int = 1) -> Step:
    norms = representation.target.flatten(1).norm(dim=1)
    sizes = torch.full((len(norms),), 9)
    return Step(
        representation,
        None,
        representation.target,
        norms,
        sizes,
        None,
        errors,
        rank=rank,
        world_size=world_size,
        seed=5,
    )


def _digits_errors(representation: Representation) -> FilterErrors:
    torch.manual_seed(0)
    weights = {}
    for layer in representation.layout.layers:
        inputs = torch.randn(layer.weights // layer.shape[0], layer.weights // layer.shape[0]) / 9
        weights[layer.key] = torch.rand(layer.shape[0]) / 100, inputs + inputs.T
    return FilterErrors(representation.layout, weights)


def test_a_step_with_all_kernels_has_the_error_of_all_weights() -> None:
    representation = digits_representation()
    errors = _digits_errors(representation)
    (term,) = Reconstruction(AllKernels())(_step(representation, errors)).values()
    whole = full_reconstruction_error(representation, representation.weights(), "mse", None, errors)
    torch.testing.assert_close(term, whole)
    (rooted,) = Reconstruction(AllKernels(), "rmse")(_step(representation, errors)).values()
    torch.testing.assert_close(
        rooted, full_reconstruction_error(representation, representation.weights(), "rmse", None, errors)
    )


def test_sampled_filters_estimate_the_error_of_all_and_processes_share_them() -> None:
    representation = digits_representation()
    errors, sampling = _digits_errors(representation), Uniform(64)
    whole = float(full_reconstruction_error(representation, representation.weights(), "mse", None, errors).detach())
    step, passes = _step(representation, errors), 0.0
    steps = math.lcm(*(layer.grid[0] for layer in representation.layout.layers))  # whole passes over each layer
    for number in range(steps):
        step.number = number
        passes += float(Reconstruction(sampling)(step)["recon"].detach())
    assert passes / steps == pytest.approx(whole, rel=1e-4)
    shared = [Reconstruction(Uniform(32))(_step(representation, errors, rank, 2))["recon"] for rank in range(2)]
    alone = Reconstruction(Uniform(64))(_step(representation, errors))["recon"]
    torch.testing.assert_close(sum(shared) / 2, alone)


def _module(scheme: str) -> ReconOnly | DecoupledDistill | Progressive | BaselineJoint:
    torch.manual_seed(0)
    representation = digits_representation()
    if scheme == "decoupled":
        phase = ReconstructionPhase(2, _adam, sensitivity=KRONECKER)
        return DecoupledDistill(representation, optimizer=_adam, reconstruction=phase, recon_weight=1.0)
    if scheme == "progressive":
        return Progressive(representation, optimizer=_adam, rounds=1, trials=2, sensitivity=KRONECKER)
    if scheme == "baseline":
        return BaselineJoint(representation, optimizer=_adam, sensitivity=KRONECKER)
    return ReconOnly(representation, optimizer=_adam, sensitivity=KRONECKER)


@pytest.mark.parametrize("scheme", ["recon_only", "decoupled", "progressive", "baseline"])
def test_every_scheme_trains_with_it(scheme: str) -> None:
    module = _module(scheme)
    data = DigitsDataModule(train_on="images", batch_size=500, val_share=0.2)
    trainer = quiet_trainer(max_epochs=3, num_sanity_val_steps=0)
    trainer.fit(module, datamodule=data)
    assert module.error_weights.filters is not None
    assert float(trainer.callback_metrics["train/recon"]) > 0


def test_a_resumed_fit_ends_with_the_same_weights(tmp_path: Path) -> None:
    def fit(steps: int, path: Path | None = None) -> dict[str, Tensor]:
        torch.manual_seed(0)
        module = ReconOnly(digits_representation(), _adam, sampling=Uniform(64), sensitivity=KRONECKER)
        trainer = quiet_trainer(max_steps=steps, num_sanity_val_steps=0)
        data = DigitsDataModule(train_on="none", steps_per_epoch=3)
        trainer.fit(module, datamodule=data, ckpt_path=path, weights_only=True)
        trainer.save_checkpoint(tmp_path / f"{steps}.ckpt")
        return module.state_dict()

    whole = fit(6)
    fit(3)
    resumed = fit(6, tmp_path / "3.ckpt")
    tensors = [key for key, value in whole.items() if isinstance(value, Tensor)]
    assert tensors
    assert all(torch.equal(whole[key], resumed[key]) for key in tensors)


def test_what_it_cannot_weigh_is_refused_by_name() -> None:
    original = Original("digits_resnet8", pretrained=True)
    with pytest.raises(UsageError, match="Codebooks chooses the code of each kernel by itself; pass fisher"):
        ReconOnly(Representation(original, Codebooks(1, 4, iterations=3)), _adam, sensitivity=KRONECKER)
    with pytest.raises(UsageError, match=r"sensitivity.cap=2 has no effect with kind kronecker"):
        Sensitivity("kronecker", cap=2)
    module = ReconOnly(Representation(original, MLP(8), "all", "none"), _adam, sensitivity=KRONECKER)
    with pytest.raises(UsageError, match=r"'linear' is predicted in tiles of several; pass fisher"):
        quiet_trainer(max_steps=1).fit(module, datamodule=DigitsDataModule(train_on="none", steps_per_epoch=1))


def test_weights_that_are_kept_at_zero_have_no_error() -> None:
    original = Original("digits_resnet8", pretrained=True)
    with torch.no_grad():
        for layer in Layout.from_module(original.net).layers:
            weight = original.net.get_parameter(layer.key)
            weight[torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) < 0.8] = 0
    representation = Representation(original, MLP(8, num_frequencies=4), order="none", keep_zeros=True)
    layout, learned = representation.layout, representation.learned.nonzero_weights()
    factors = {}
    for layer in layout.layers:
        inputs = layer.weights // layer.shape[0]
        factors[layer.key] = Factors(torch.eye(layer.shape[0]), torch.eye(inputs))
    errors = FilterErrors(layout, filter_weights(layout, factors, 0.0, learned))
    step = _step(representation, errors)
    step.sizes = representation.learned.mask().sum((1, 2)) if representation.learned.mask() is not None else step.sizes
    (found,) = Reconstruction(AllKernels())(step).values()
    step.filter_errors = None
    (plain,) = Reconstruction(AllKernels())(step).values()
    torch.testing.assert_close(found, plain)  # an exponent of 0 counts all errors alike
    step.filter_errors, step.ensemble = errors, PredictorEnsemble(representation.predictor, 1)
    step.ensemble.each[0].load_state_dict(representation.predictor.state_dict())
    (trial,) = Reconstruction(AllKernels())(step).values()
    torch.testing.assert_close(trial, found)


def test_an_exponent_that_overflows_and_a_checkpoint_of_other_layers_are_errors() -> None:
    layout, factors = _factors()
    with pytest.raises(UsageError, match="exponent=900 makes all error weights 0 or infinite; pass a smaller one"):
        filter_weights(layout, factors, 900)
    with pytest.raises(DataError, match="are all 0, or not finite"):
        filter_weights(layout, {key: Factors(*(0 * each for each in own)) for key, own in factors.items()}, 0.5)
    representation = digits_representation()
    stored = {"options": {}, "filters": filter_weights(layout, factors, 0.5)}
    with pytest.raises(CheckpointError, match="sensitivities are of other layers; pass the configuration of its fit"):
        ErrorWeights(KRONECKER, representation, reconstructs=True).load(stored, representation)
