import numpy as np
import pytest
import torch

from nernlit.errors import UsageError
from nernlit.originals import Original
from nernlit.predictors import MLP, FourierEncoding
from nernlit.representation import Representation
from tests.reference import slow

ADDRESSES = torch.tensor([[0, 0, 0], [3, 511, 2], [18, 17, 300]])


def _bound(**options: object) -> MLP:
    torch.manual_seed(0)
    mlp = MLP(16, **options)  # type: ignore[arg-type]
    mlp.bind([(512, 512)] * 19)
    return mlp


def test_the_encoding_matches_the_plain_reference() -> None:
    table = FourierEncoding().table(512)
    for address in ADDRESSES.tolist():
        expected = slow.encode(*address, num_frequencies=40, base=0.76)
        assert np.allclose(torch.cat([table[index] for index in address]).numpy(), expected, atol=1e-6)


def test_it_equals_the_plain_reference() -> None:
    mlp = _bound()
    linears = [mlp.first, *(m for m in mlp.rest if isinstance(m, torch.nn.Linear))]
    layers = [(m.weight.detach().double().numpy(), m.bias.detach().double().numpy()) for m in linears]
    predicted = mlp(ADDRESSES).detach().numpy()
    for row, address in enumerate(ADDRESSES.tolist()):
        expected = slow.mlp(slow.encode(*address, num_frequencies=40, base=0.76), layers)
        assert np.allclose(predicted[row].ravel(), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "layers", "hidden", "percent"),
    [
        ("cifar_resnet20", "all_convs", 120, 27),
        ("cifar_resnet20", "all_convs", 140, 35),
        ("cifar_resnet20", "all_convs", 180, 53),
        ("cifar_resnet56", "all_convs", 220, 24),
        ("cifar_resnet56", "all_convs", 280, 36),
        ("cifar_resnet56", "all_convs", 320, 46),
        ("cifar_resnet56", "all_convs", 360, 57),
        ("resnet18", "stages_3x3", 700, 15),
        ("resnet18", "stages_3x3", 1024, 31),
        ("resnet18", "stages_3x3", 1372, 55),
    ],
)
def test_compression_ratios_are_the_papers(name: str, layers: str, hidden: int, percent: int) -> None:
    representation = Representation(Original(name), MLP(hidden), layers=layers, order="none")  # type: ignore[arg-type]
    assert round(100 * representation.sizes().cr_paper) == percent


@pytest.mark.parametrize(("hidden", "params", "mib"), [(140, 94_229, 0.36), (320, 388_169, 1.48)])
def test_predictor_sizes_are_the_papers(hidden: int, params: int, mib: float) -> None:
    assert MLP(hidden).num_params == params == 240 * hidden + hidden + 3 * (hidden**2 + hidden) + 9 * hidden + 9
    assert round(4 * params / 2**20, 2) == mib


def test_depth_levels_and_kernel_size_are_arguments() -> None:
    mlp = MLP(10, depth=3, num_frequencies=8, kernel_size=5)
    assert mlp.num_params == 48 * 10 + 10 + 110 + 25 * 11
    mlp.bind([(1, 1)])
    assert mlp(torch.zeros(2, 3, dtype=torch.long)).shape == (2, 5, 5)


def test_wrong_use_is_refused() -> None:
    with pytest.raises(UsageError, match="hidden=0, depth=5; expected a width of at least 1"):
        MLP(0)
    with pytest.raises(UsageError, match="does not know the range of the addresses; call bind"):
        MLP(4)(ADDRESSES)
    with pytest.raises(UsageError, match=r"num_frequencies=0, base=0\.76; expected at least one frequency"):
        MLP(4, num_frequencies=0)
