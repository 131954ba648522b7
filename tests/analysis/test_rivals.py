import pytest
import torch

from nernlit.analysis import factorized, multiplied, pruned
from nernlit.errors import UsageError


def test_pruning_keeps_the_largest_weights_of_all_layers() -> None:
    state = {
        "small.weight": torch.tensor([[0.1, -0.2], [0.3, 0.05]]),
        "large.weight": torch.tensor([[4.0], [-5.0]]),
    }
    kept = pruned(state, 0.5)
    assert kept["small.weight"].equal(torch.tensor([[0.0, 0.0], [0.3, 0.0]]))
    assert kept["large.weight"].equal(state["large.weight"])
    assert pruned(state, 1.0)["small.weight"].equal(state["small.weight"])


def test_pruning_keeps_the_density_among_equal_weights() -> None:
    state = {"a": torch.tensor([1.0, -1.0, 1.0]), "b": torch.tensor([1.0, 0.5])}
    assert sum(int(value.count_nonzero()) for value in pruned(state, 0.4).values()) == 2


def test_factors_of_exactly_the_share_have_its_rank() -> None:
    state = {"weight": torch.randn(79, 77, generator=torch.Generator().manual_seed(0))}
    stored = factorized(state, ["weight"], 24 * (79 + 77) / (79 * 77))
    assert stored["weight.left"].shape == (79, 24)


def test_factors_have_the_share_of_the_numbers_and_the_smallest_error_of_their_rank() -> None:
    weight = torch.randn(12, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    state = {"conv.weight": weight, "head.weight": torch.ones(1, 5), "conv.bias": torch.zeros(12)}
    stored = factorized(state, ["conv.weight", "head.weight"], 0.5)
    assert {name: tuple(value.shape) for name, value in stored.items()} == {
        "conv.weight.left": (12, 4),  # 0.5 * 12 * 36 / (12 + 36) = 4.5
        "conv.weight.right": (4, 36),
        "head.weight": (1, 5),
        "conv.bias": (12,),
    }
    restored = multiplied(stored, state)
    values = torch.linalg.svdvals(weight.flatten(1))
    assert float((restored["conv.weight"] - weight).norm()) == pytest.approx(float(values[4:].norm()), rel=1e-5)
    assert restored["head.weight"].equal(state["head.weight"])


@pytest.mark.parametrize("share", [0.0, 1.1])
def test_a_share_out_of_its_range_is_refused(share: float) -> None:
    state = {"weight": torch.ones(2, 2)}
    with pytest.raises(UsageError, match=f"density={share}; expected a share of the numbers above 0 and up to 1"):
        pruned(state, share)
    with pytest.raises(UsageError, match=f"share={share}; expected a share of the numbers above 0 and up to 1"):
        factorized(state, ["weight"], share)
