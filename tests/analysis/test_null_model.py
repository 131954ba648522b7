import pytest
import torch

from nernlit.analysis import noise_like
from nernlit.errors import UsageError


def _errors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "wide": torch.randn(6, 4, 3, 3, generator=generator),
        "high": torch.randn(7, 1, 2, 2, generator=generator),
        "pointwise": torch.randn(5, 8, 1, 1, generator=generator),
        "none": torch.zeros(3, 2, 3, 3),
    }


def _drawn(errors: dict[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    return noise_like(errors, torch.Generator().manual_seed(seed))


def test_noise_has_the_singular_values_and_the_norm_of_each_error() -> None:
    errors = _errors()
    for key, noise in _drawn(errors, 1).items():
        assert noise.shape == errors[key].shape
        assert noise.dtype == errors[key].dtype
        values = [torch.linalg.svdvals(each.flatten(1)) for each in (noise, errors[key])]
        assert torch.allclose(*values, atol=1e-5), key
        assert torch.allclose(noise.norm(), errors[key].norm(), atol=1e-5)


def test_noise_is_a_function_of_the_seed_and_independent_of_the_errors_bases() -> None:
    errors = _errors()
    one, same, other = (_drawn(errors, seed)["wide"] for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.allclose(one, other, atol=0.1)
    turned = {"wide": torch.linalg.qr(torch.randn(6, 6))[0].mm(errors["wide"].flatten(1)).view(6, 4, 3, 3)}
    assert torch.allclose(_drawn(turned, 1)["wide"], one, atol=1e-4)


def test_noise_has_mean_zero_and_no_preferred_entry() -> None:
    error = {"conv": torch.zeros(3, 2, 2, 1)}
    error["conv"][0, 0, 0, 0], error["conv"][1, 1, 0, 0] = 2.0, 1.0
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([noise_like(error, generator)["conv"] for _ in range(4000)])
    assert torch.allclose(draws.mean(0), torch.zeros(3, 2, 2, 1), atol=0.05)
    assert torch.allclose(draws.square().mean(0), torch.full((3, 2, 2, 1), 5 / 12), atol=0.05)


def test_errors_that_are_not_finite_are_refused() -> None:
    with pytest.raises(UsageError, match="'conv' are not finite"):
        _drawn({"conv": torch.full((2, 2, 3, 3), float("nan"))}, 0)
