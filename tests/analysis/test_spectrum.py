import math

import numpy as np
import pytest
import torch

from nernlit.analysis import layer_errors
from nernlit.analysis.spectrum import layer_energies, low_frequency_energy
from nernlit.errors import UsageError
from nernlit.utilities.processes import Processes
from tests.fakes import tiny_representation


def test_energy_matches_numpy_layer_by_layer() -> None:
    shapes = [(4, 3, 3, 3), (4, 3, 3, 3), (8, 4, 1, 1), (1, 5, 3, 3), (5, 1, 1, 1), (2, 7, 5, 5)]
    weights = {str(number): torch.randn(shape) for number, shape in enumerate(shapes)}
    shares = low_frequency_energy(weights)
    assert list(shares) == list(weights)
    for key, weight in weights.items():
        values = np.linalg.svd(weight.double().numpy().reshape(len(weight), -1), compute_uv=False) ** 2
        assert shares[key] == pytest.approx(values[: len(values) // 2].sum() / values.sum(), abs=1e-12)


def test_energy_does_not_depend_on_scale_or_the_channels_numbering() -> None:
    weight = torch.randn(6, 5, 3, 3)
    shuffled = -3.7 * weight[torch.randperm(6)][:, torch.randperm(5)]
    shares = low_frequency_energy({"a": weight, "b": shuffled})
    assert shares["a"] == pytest.approx(shares["b"], abs=1e-6)


def test_a_weight_of_low_rank_has_all_its_energy_in_the_first_half_and_zeros_have_none() -> None:
    low = (torch.randn(8, 2) @ torch.randn(2, 36)).view(8, 4, 3, 3)
    shares = low_frequency_energy({"low": low, "zeros": torch.zeros(8, 4, 3, 3)})
    assert shares["low"] == pytest.approx(1, abs=1e-6)
    assert math.isnan(shares["zeros"])


def test_processes_share_the_decompositions() -> None:
    weights = {str(number): torch.randn(2 + number, 3, 3, 3) for number in range(5)}
    shares = [low_frequency_energy(weights, Processes(rank, 2)) for rank in range(2)]
    assert [sum(value > 0 for value in share.values()) for share in shares] == [3, 2]
    for key, value in low_frequency_energy(weights).items():
        assert sorted(share[key] for share in shares) == [0, pytest.approx(value)]


def test_a_representations_layers_are_compared_with_the_originals() -> None:
    representation = tiny_representation()
    energies = layer_energies(representation)
    assert [energy.name + ".weight" for energy in energies] == [layer.key for layer in representation.layout.layers]
    originals = low_frequency_energy(
        {layer.key: representation.original.net.state_dict()[layer.key] for layer in representation.layout.layers}
    )
    reconstructed = low_frequency_energy(representation.weights())
    assert [energy.original for energy in energies] == pytest.approx(list(originals.values()), nan_ok=True)
    assert [energy.difference for energy in energies] == pytest.approx(
        [reconstructed[key] - originals[key] for key in originals], nan_ok=True
    )


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_weight_that_is_not_finite_is_refused_by_name(value: float) -> None:
    weights = {"good": torch.ones(2, 2, 3, 3), "bad": torch.full((2, 2, 3, 3), value)}
    with pytest.raises(UsageError, match="36 of the 36 values of 'bad' are not finite, so it cannot be analyzed"):
        low_frequency_energy(weights)


def test_a_diverged_fit_is_refused_with_the_layers_name() -> None:
    representation = tiny_representation()
    with torch.no_grad():
        next(representation.predictor.parameters()).fill_(math.nan)
    for analysis in (layer_energies, layer_errors):
        with pytest.raises(UsageError, match=r"150 of the 150 values of 'stem\.weight' are not finite"):
            analysis(representation)
