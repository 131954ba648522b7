import pytest
import torch

from nernlit.analysis import low_frequency_energy
from nernlit.losses import high_frequency_share
from nernlit.originals import Original

SHAPES = [(4, 3, 3, 3), (5, 1, 2, 2), (4, 3, 3, 3), (1, 6, 1, 1), (7, 2, 1, 1)]


def _weights() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]


def test_it_is_the_rest_of_the_low_frequency_energy() -> None:
    state = Original("digits_resnet8", pretrained=True).net.state_dict()
    for weights in (_weights(), [value for value in state.values() if value.dim() == 4]):
        low = low_frequency_energy({str(number): weight for number, weight in enumerate(weights)})
        assert float(high_frequency_share(weights)) == pytest.approx(1 - sum(low.values()) / len(low), abs=1e-6)


def test_scale_and_rotation_change_nothing_so_that_gradients_are_orthogonal_to_the_weights() -> None:
    (weight, *_) = _weights()
    share = high_frequency_share([weight])
    rotation = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64)).Q
    rotated = (rotation @ weight.flatten(1)).view_as(weight)
    assert torch.allclose(high_frequency_share([0.01 * rotated]), share)
    variable = weight.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(high_frequency_share([variable]), variable)
    assert float((gradient * weight).sum().abs()) < 1e-10 * float(gradient.norm() * weight.norm())
    assert float(high_frequency_share([weight - 0.5 * gradient])) < float(share)


def test_gradients_match_finite_differences_and_are_finite_for_equal_and_zero_singular_values() -> None:
    weights = [weight.requires_grad_() for weight in _weights()]
    assert torch.autograd.gradcheck(lambda *given: high_frequency_share(given), weights)
    for special in (torch.eye(4).view(4, 4, 1, 1), torch.zeros(4, 4, 1, 1)):
        variable = special.clone().requires_grad_()
        high_frequency_share([variable]).backward()
        assert variable.grad is not None
        assert torch.isfinite(variable.grad).all()
