import pytest
import torch
from torch import Tensor

from nernlit.errors import DataError
from nernlit.kernels import AllKernels, Uniform
from nernlit.predictors import PredictorEnsemble
from nernlit.representation import Representation
from nernlit.training import Distillation, Reconstruction, Step
from tests.fakes import digits_representation, tiny_representation


def _step(representation: Representation, batch: object = None, **options: object) -> Step:
    target = representation.target
    norms = target.flatten(1).norm(dim=1)
    sizes = representation.learned.per_kernel()
    return Step(representation, batch, target, norms, sizes, **options)  # type: ignore[arg-type]


def _error(representation: Representation, kernels: Tensor) -> Tensor:
    """The mean squared error of all weights, one layer after the other."""
    layout = representation.layout
    predicted, target = layout.weights(kernels), representation.original_weights()
    errors = torch.cat([(predicted[key] - target[key]).flatten() for key in target])
    return errors.square().mean() / representation.scale.square()


@pytest.mark.parametrize("loss", ["mse", "rmse"])
def test_reconstruction_is_the_error_of_all_weights(loss: str) -> None:
    representation = tiny_representation()
    step = _step(representation)
    expected = _error(representation, representation.kernels())
    objective = Reconstruction(AllKernels(), loss)  # type: ignore[arg-type]
    term = objective(step)["recon"]
    assert torch.allclose(term, expected.sqrt() if loss == "rmse" else expected, rtol=1e-5)
    power = torch.cat([w.flatten() for w in representation.original_weights().values()]).square().mean()
    explained = 1 - expected.detach() * representation.scale.square() / power
    assert step.metrics["explained_power"] == pytest.approx(float(explained), abs=1e-5)


def test_several_predictors_are_summed_and_one_that_is_not_finite_is_left_out() -> None:
    representation = tiny_representation()
    ensemble = PredictorEnsemble(representation.predictor, 3)
    ensemble.reset(1, 2, 3)
    errors = [float(_error(representation, representation.kernels(predictor=p)).detach()) for p in ensemble.each]
    assert float(Reconstruction(AllKernels())(_step(representation, ensemble=ensemble))["recon"]) == pytest.approx(
        sum(errors), rel=1e-5
    )
    with torch.no_grad():
        next(ensemble.each[1].parameters()).fill_(torch.nan)
    step = _step(representation, ensemble=ensemble, curve="recon_round_1")
    assert float(Reconstruction(AllKernels())(step)["recon"]) == pytest.approx(errors[0] + errors[2], rel=1e-5)
    assert float(step.metrics["recon_round_1"]) == pytest.approx((errors[0] + errors[2]) / 2, rel=1e-5)


def test_processes_share_the_kernels_of_a_step_out() -> None:
    representation = tiny_representation()
    alone = Reconstruction(Uniform(24))(_step(representation, seed=5, number=2))["recon"]
    shares = [
        Reconstruction(Uniform(8))(_step(representation, seed=5, number=2, rank=rank, world_size=3))["recon"]
        for rank in range(3)
    ]
    assert torch.allclose(torch.stack(shares).mean(), alone, rtol=1e-5)


def test_an_objective_that_needs_images_says_what_it_was_given() -> None:
    representation = digits_representation()
    with pytest.raises(DataError, match=r"a batch is a NoneType; expected \(images, labels\)"):
        Distillation(representation.original)(_step(representation))
