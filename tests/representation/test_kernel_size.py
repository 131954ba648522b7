"""Kernels that are not square: (height, width) as the predictor's `kernel_size`."""

from pathlib import Path

import pytest
import torch
from torch import nn

import nernlit
from nernlit.analysis import layer_energies, layer_errors
from nernlit.errors import LayoutError, UsageError
from nernlit.originals import Original
from nernlit.predictors import MLP, Codebooks, Predictor, Table
from nernlit.representation import Representation
from tests.fakes import tiny_original


def _signals() -> nn.Module:
    return nn.Sequential(nn.Conv1d(2, 4, 9), nn.ReLU(), nn.Conv1d(4, 3, 9))


def _predictors(size: tuple[int, int]) -> list[Predictor]:
    return [
        MLP(8, depth=3, kernel_size=size, num_frequencies=4),
        Table(size),
        Codebooks(2, 2, scale="filter", kernel_size=size),
    ]


@pytest.mark.parametrize("number", range(3))
@pytest.mark.parametrize("order", ["none", "in_filter", "cross_filter"])
def test_one_dimensional_kernels_are_predicted_without_padding(tmp_path: Path, number: int, order: str) -> None:
    torch.manual_seed(0)
    original, predictor = Original.from_module(_signals()), _predictors((1, 9))[number]
    representation = Representation(original, predictor, order=order)  # type: ignore[arg-type]
    assert representation.kernels().shape == (8 + 12, 1, 9)
    assert representation.learned.mask() is None
    assert [energy.name for energy in layer_energies(representation)] == ["0", "2"]
    assert [error.name for error in layer_errors(representation)] == ["0", "2"]
    representation.save(tmp_path / "signals.nern")
    loaded = nernlit.load(tmp_path / "signals.nern", net=_signals())
    assert loaded.specification() == representation.specification()
    assert loaded.specification()["tile"] == loaded.specification()["predictor"]["init_args"]["kernel_size"] == [1, 9]
    stored = representation.reconstructed()
    assert all(torch.equal(value, stored[key]) for key, value in loaded.reconstructed().items())


def test_parameters_are_those_of_the_kernels_that_are_predicted() -> None:
    mlp, table, codebooks = _predictors((1, 9))
    for predictor in (mlp, table, codebooks):
        predictor.bind([(4, 2)])
    assert mlp.num_params == (24 * 8 + 8) + (8 * 8 + 8) + (8 * 9 + 9)
    assert table.num_params == 8 * 9
    assert codebooks.num_params == 2 * 4 * 9 + 4


def test_a_table_reconstructs_every_kernel_and_tile_exactly() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 3, (12, 1)), nn.Conv2d(3, 3, (5, 2)), nn.Conv2d(3, 2, 1), nn.Linear(7, 5))
    original = Original.from_module(net)
    for pointwise in ("crop", "tile"):
        representation = Representation(original, Table((12, 2)), "all", pointwise=pointwise)  # type: ignore[arg-type]
        state = representation.reconstructed()
        assert all(torch.allclose(state[key], value) for key, value in original.net.state_dict().items())


def test_a_square_is_one_number_in_every_specification() -> None:
    square, pair = (Representation(tiny_original(), MLP(4, kernel_size=size)) for size in (5, (5, 5)))
    assert square.specification() == pair.specification()
    assert pair.specification()["tile"] == pair.specification()["predictor"]["init_args"]["kernel_size"] == 5
    pair.load_state_dict(square.state_dict())


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (3, r"kernel_size=3 is smaller than layer '0' \(1x9\); pass --model.*kernel_size=\[1,9\], or exclude"),
        ((9, 1), r"kernel_size=\[9,1\] is smaller than layer '0' \(1x9\); pass --model.*kernel_size=\[1,9\], or"),
    ],
)
def test_the_message_has_the_size_that_is_needed(size: int | tuple[int, int], message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        Representation(Original.from_module(_signals()), MLP(4, kernel_size=size))


def test_the_needed_size_is_that_of_all_layers() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, (1, 7)), nn.Conv2d(2, 2, (7, 1)), nn.Conv2d(2, 2, 3), nn.Linear(9, 9))
    with pytest.raises(
        LayoutError, match=r"kernel_size=3 is smaller than layer '0' \(1x7\); pass --.*kernel_size=7, or"
    ):
        Representation(Original.from_module(net), MLP(4), "all")


@pytest.mark.parametrize("size", [(3,), (3, 0), (1, 2, 3), 2.5, "3", True])
def test_what_is_no_size_is_refused(size: object) -> None:
    with pytest.raises(UsageError, match=r"kernel_size=.*; expected an integer of at least 1, or two of them: \[heig"):
        Table(size)  # type: ignore[arg-type]
