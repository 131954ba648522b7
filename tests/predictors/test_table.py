from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import nernlit
from nernlit.errors import UsageError
from nernlit.kernels import AllKernels
from nernlit.predictors import PredictorEnsemble, Table
from nernlit.representation import Representation, without_fitting
from nernlit.training import ReconOnly
from tests.fakes import digits_representation, quiet_trainer, tiny_original


def _adam(parameters: Iterator[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=1e-2)


def _steps(count: int) -> DataLoader[int]:
    return DataLoader(range(count), batch_size=None)  # type: ignore[arg-type]


@torch.no_grad()
def _error(representation: Representation) -> float:
    """The root-mean-square error in units of the scale."""
    layout = representation.layout
    errors = layout.vector(representation.weights()) - layout.vector(representation.original_weights())
    return float(errors.square().mean().sqrt() / representation.scale)


@pytest.mark.parametrize("order", ["none", "in_filter", "cross_filter"])
@pytest.mark.parametrize("kernel_size", [5, 7])
def test_it_starts_as_the_original(order: str, kernel_size: int) -> None:
    original = tiny_original()
    representation = Representation(original, Table(kernel_size), order=order)  # type: ignore[arg-type]
    for key, value in representation.reconstructed().items():
        assert torch.allclose(value, original.net.state_dict()[key], rtol=1e-6, atol=0)


def test_it_starts_as_the_original_with_tiles_too() -> None:
    original = tiny_original()
    representation = Representation(original, Table(5), layers="all", pointwise="tile")
    for key, value in representation.reconstructed().items():
        assert torch.allclose(value, original.net.state_dict()[key], rtol=1e-6, atol=0)


def test_it_has_a_parameter_per_entry_of_every_kernel() -> None:
    representation = Representation(digits_representation().original, Table(), order="none")
    assert representation.sizes().predictor_params == 9 * representation.layout.num_kernels


@pytest.mark.parametrize("loss", ["mse", "rmse"])
def test_an_exact_table_does_not_move(loss: str) -> None:
    representation = Representation(tiny_original(), Table(5), standardize=False)
    before = representation.predictor.state_dict()["entries"].clone()
    module = ReconOnly(representation, _adam, sampling=AllKernels(), loss=loss)  # type: ignore[arg-type]
    quiet_trainer(max_steps=3).fit(module, _steps(3))
    assert torch.equal(representation.predictor.state_dict()["entries"], before)


def test_a_table_of_random_kernels_learns_the_originals() -> None:
    with without_fitting():
        representation = Representation(tiny_original(), Table(5))
    errors = [_error(representation)]
    quiet_trainer(max_steps=1000).fit(ReconOnly(representation, _adam, sampling=AllKernels()), _steps(1000))
    errors.append(_error(representation))
    assert errors[0] > 1
    assert errors[1] < 0.01


@pytest.mark.parametrize("order", ["none", "in_filter"])
def test_a_file_gives_the_same_table(order: str, tmp_path: Path) -> None:
    representation = Representation(digits_representation().original, Table(), order=order)  # type: ignore[arg-type]
    with torch.no_grad():
        representation.predictor.state_dict()["entries"].add_(0.01)
    representation.save(tmp_path / "table.nern")
    loaded = nernlit.load(tmp_path / "table.nern")
    for key, value in representation.reconstructed().items():
        assert torch.equal(loaded.reconstructed()[key], value)


def test_a_file_has_no_numbers_outside_of_crops(tmp_path: Path) -> None:
    original = tiny_original()  # 5x5, 3x3, 1x3 and 1x1 kernels
    large, small = (Representation(original, Table(size)) for size in (9, 5))
    assert large.predictor.stored()["entries"].shape == (large.layout.num_weights,)
    assert abs(large.sizes().file_bytes - small.sizes().file_bytes) < 10
    large.save(tmp_path / "net.nern")
    loaded = nernlit.load(tmp_path / "net.nern", net=tiny_original().net)
    for key, value in original.net.state_dict().items():
        assert torch.allclose(loaded.reconstructed()[key], value, rtol=1e-6, atol=0), key


def test_trials_are_tables_of_their_own() -> None:
    representation = Representation(tiny_original(), Table(5))
    trials = PredictorEnsemble(representation.predictor, 2)
    trials.reset(0, 1)
    one, other = trials(representation.addresses)
    assert not torch.equal(one, other)
    assert torch.allclose(trials.batched(representation.addresses), torch.stack([one, other]))


def test_use_before_bind_is_refused() -> None:
    with pytest.raises(UsageError, match=r"the Table does not know its addresses; call bind\(layers\) first"):
        Table()(torch.zeros(1, 3, dtype=torch.long))


class Counting(nernlit.Predictor):
    """Counts how often it is fitted."""

    def __init__(self, kernel_size: int = 3) -> None:
        super().__init__(kernel_size)
        self.calls: list[tuple[int, ...]] = []
        self.kernel = nn.Parameter(torch.zeros(kernel_size, kernel_size))

    def bind(self, layers: Sequence[tuple[int, int]]) -> None:
        self.layers = layers

    def fit(self, blocks_NKK: torch.Tensor, addresses_N3: torch.Tensor, weights_NKK: torch.Tensor) -> None:
        self.calls.append((len(blocks_NKK), len(addresses_N3), int(weights_NKK.sum())))

    def forward(self, addresses_N3: torch.Tensor) -> torch.Tensor:
        return self.kernel.expand(len(addresses_N3), -1, -1)


def test_a_predictor_is_fitted_once_when_it_is_built_from_an_original(tmp_path: Path) -> None:
    representation = Representation(tiny_original(), Counting(5))
    layout = representation.layout
    predictor = representation.predictor
    assert isinstance(predictor, Counting)
    assert predictor.calls == [(layout.num_kernels, layout.num_kernels, layout.num_weights)]
    assert predictor.layers == [layer.grid for layer in layout.layers]


def test_a_predictor_from_a_file_is_not_fitted(tmp_path: Path) -> None:
    Representation(digits_representation().original, Counting()).save(tmp_path / "own.nern")
    loaded = nernlit.load(tmp_path / "own.nern").predictor
    assert isinstance(loaded, Counting)
    assert loaded.calls == []
