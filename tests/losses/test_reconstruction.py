import numpy as np
import pytest
import torch

from nernlit.losses import explained_power, reconstruction_mse, reconstruction_rmse
from tests.reference import slow

GENERATOR = torch.Generator().manual_seed(0)
PREDICTED, TARGET = torch.randn(2, 6, 3, 3, generator=GENERATOR)
MASK = torch.rand(6, 3, 3, generator=GENERATOR) < 0.5


@pytest.mark.parametrize("mask", [None, MASK])
def test_losses_match_the_plain_reference(mask: torch.Tensor | None) -> None:
    used = torch.ones(6, 3, 3, dtype=torch.bool) if mask is None else mask
    expected = slow.mean_squared_error(PREDICTED.numpy(), TARGET.numpy(), used.numpy())
    power = slow.mean_squared_error(np.zeros((6, 3, 3)), TARGET.numpy(), used.numpy())
    assert float(reconstruction_mse(PREDICTED, TARGET, mask)) == pytest.approx(expected, rel=1e-5)
    assert float(reconstruction_rmse(PREDICTED, TARGET, mask)) == pytest.approx(expected**0.5, rel=1e-5)
    assert float(explained_power(PREDICTED, TARGET, mask)) == pytest.approx(1 - expected / power, rel=1e-4)


def test_nothing_outside_the_mask_gets_a_gradient() -> None:
    predicted = PREDICTED.clone().requires_grad_()
    reconstruction_mse(predicted, TARGET, MASK).backward()
    assert predicted.grad is not None
    assert not predicted.grad[~MASK].any()
    assert predicted.grad[MASK].all()


def test_shapes_that_would_broadcast_are_refused() -> None:
    with pytest.raises(ValueError, match=r"predicted \(6, 3, 3\), target \(1, 3, 3\): expected equal shapes"):
        reconstruction_mse(PREDICTED, TARGET[:1])


def test_shares_of_a_mean_add_up_to_it() -> None:
    whole = reconstruction_mse(PREDICTED, TARGET, MASK)
    total = int(MASK.sum())
    shares = [
        reconstruction_mse(*part, num_weights=total)
        for part in zip(PREDICTED.split([1, 5, 0]), TARGET.split([1, 5, 0]), MASK.split([1, 5, 0]), strict=True)
    ]
    assert float(torch.stack(shares).sum()) == pytest.approx(float(whole), rel=1e-6)
    assert float(shares[2]) == 0
