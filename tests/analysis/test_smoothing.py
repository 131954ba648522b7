import math

import numpy as np
import pytest
import torch

from nernlit.analysis.smoothing import average, gaussian_smooth, shrink_singular_values, truncate_singular_values
from nernlit.analysis.spectrum import low_frequency_energy
from nernlit.errors import UsageError
from nernlit.kernels import Layout


def _weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {"a": torch.randn(6, 4, 3, 3, generator=generator), "b": torch.randn(5, 8, 1, 1, generator=generator)}


def test_truncation_is_the_best_approximation_of_its_rank() -> None:
    weights = _weights()
    for keep in (0.34, 0.5, 1.0):
        for key, weight in truncate_singular_values(weights, keep).items():
            matrix = weights[key].flatten(1).double().numpy()
            values = np.linalg.svd(matrix, compute_uv=False)
            rank = math.floor(keep * len(values))
            assert np.linalg.matrix_rank(weight.flatten(1).double().numpy(), tol=1e-4) == rank
            error = np.linalg.norm(weight.flatten(1).double().numpy() - matrix)
            assert error == pytest.approx(math.sqrt(np.square(values[rank:]).sum()), abs=1e-5)


def test_truncation_keeps_a_singular_value_of_every_layer() -> None:
    weights = {"one_filter": torch.randn(1, 4, 3, 3), "five": torch.randn(5, 8, 1, 1)}
    for key, weight in truncate_singular_values(weights, 0.1).items():
        assert np.linalg.matrix_rank(weight.flatten(1).double().numpy(), tol=1e-4) == 1, key


def test_shrinking_the_small_values_raises_low_frequency_energy_and_leaves_the_large_ones() -> None:
    weights = _weights()
    some, all_of_them, none = (shrink_singular_values(weights, by) for by in (0.2, 1.0, 0.0))
    before, after = low_frequency_energy(weights), low_frequency_energy(some)
    for key, weight in weights.items():
        assert after[key] > before[key]
        assert torch.allclose(none[key], weight, atol=1e-6)
        assert torch.allclose(all_of_them[key], truncate_singular_values({key: weight}, 0.5)[key], atol=1e-6)
        singular = [torch.linalg.svdvals(x.flatten(1)) for x in (weight, some[key])]
        kept = round(0.5 * len(singular[0]))
        assert torch.allclose(singular[0][:kept], singular[1][:kept], atol=1e-5)


def test_blurring_matches_a_slow_walk_along_the_order() -> None:
    table = torch.randn(9, 2, 2, dtype=torch.float64)
    order = [torch.tensor([2, 0, 3, 1]), torch.tensor([8, 5, 6, 4, 7])]
    sigma = 0.8
    smooth = gaussian_smooth(table, order, sigma)
    for rows in order:
        for place, row in enumerate(rows.tolist()):
            shares = [math.exp(-0.5 * ((other - place) / sigma) ** 2) for other in range(len(rows))]
            expected = sum(share * table[rows[i]] for i, share in enumerate(shares)) / sum(shares)
            assert torch.allclose(smooth[row], expected, atol=1e-4)
    assert torch.equal(gaussian_smooth(table, order, 0), table)
    constant = torch.full_like(table, 3.0)
    assert torch.allclose(gaussian_smooth(constant, order, 2.5), constant)


def test_the_mean_of_solutions_and_what_is_refused() -> None:
    one, two = _weights(), {key: 3 * value for key, value in _weights().items()}
    assert torch.allclose(average([one, two])["a"], 2 * one["a"])
    with pytest.raises(UsageError, match="no solutions"):
        average([])
    with pytest.raises(UsageError, match="keep=0"):
        truncate_singular_values(one, 0)
    with pytest.raises(UsageError, match="by=2"):
        shrink_singular_values(one, 2)
    with pytest.raises(UsageError, match="sigma=-1"):
        gaussian_smooth(torch.zeros(1, 1, 1), [], -1)


def test_padding_of_tiles_is_no_neighbor() -> None:
    layout = Layout([("linear.weight", (3, 5))], tile=2)
    table_NKK = layout.table({"linear.weight": torch.ones(3, 5)})
    masks, numbers = layout.masks((2, 2))
    smoothed = gaussian_smooth(table_NKK, [torch.arange(6)], 0.7, masks[numbers.long()])
    assert torch.allclose(layout.weights(smoothed)["linear.weight"], torch.ones(3, 5))
    assert not torch.allclose(
        layout.weights(gaussian_smooth(table_NKK, [torch.arange(6)], 0.7))["linear.weight"], torch.ones(3, 5)
    )
