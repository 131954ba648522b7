import copy
import io
import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from nernlit.analysis import landscape_figure
from nernlit.analysis.landscape import (
    Evaluation,
    ReestimatedBatchNorm,
    distance,
    evaluate,
    interpolate,
    loss_grid,
    plane_through,
    random_plane,
)
from nernlit.errors import UsageError
from nernlit.originals import Original
from tests.fakes import tiny_representation


def _point(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "a": torch.randn(4, 3, 3, 3, generator=generator, dtype=torch.float64),
        "b": torch.randn(2, 4, 1, 1, generator=generator, dtype=torch.float64),
    }


def _flat(point: dict[str, Tensor]) -> Tensor:
    return torch.cat([value.flatten() for value in point.values()])


def test_points_between_two_are_where_they_should_be() -> None:
    start, end = _point(0), _point(1)
    assert distance(start, end) == pytest.approx(float((_flat(end) - _flat(start)).norm()))
    for share in (-0.5, 0.0, 0.3, 1.0, 2.0):
        middle = interpolate(start, end, share)
        assert torch.allclose(_flat(middle), (1 - share) * _flat(start) + share * _flat(end))
        assert distance(start, middle) == pytest.approx(abs(share) * distance(start, end))


def test_a_plane_goes_through_its_three_points_and_measures_in_weights() -> None:
    points = [_point(seed) for seed in range(3)]
    plane = plane_through(*points)
    for point, mark in zip(points, plane.marks, strict=True):
        assert torch.allclose(_flat(plane.at(*mark)), _flat(point), atol=1e-12)
    for i in range(3):
        for j in range(3):
            assert math.dist(plane.marks[i], plane.marks[j]) == pytest.approx(distance(points[i], points[j]))
    with pytest.raises(UsageError, match="lie on a line"):
        plane_through(points[0], points[1], interpolate(points[0], points[1], 0.4))
    with pytest.raises(UsageError, match="lie on a line"):
        plane_through(points[0], points[0], points[1])


def test_random_directions_have_the_filters_norms() -> None:
    point = _point(0)
    point["a"][1] = 0
    plane = random_plane(point, torch.Generator().manual_seed(0))
    for direction in (plane.right, plane.up):
        for key, weight in point.items():
            assert torch.allclose(direction[key].flatten(1).norm(dim=1), weight.flatten(1).norm(dim=1))
    assert not torch.allclose(plane.right["a"], plane.up["a"])


def test_reestimated_statistics_are_those_of_the_images() -> None:
    original = Original("digits_resnet8", pretrained=True).freeze()
    images = torch.rand(300, 1, 8, 8)
    point = {key: 3 * value.detach() for key, value in original.net.state_dict().items() if value.dim() == 4}
    before = {key: value.clone() for key, value in original.state_dict().items()}
    classify = ReestimatedBatchNorm(original, [(images, torch.zeros(300))])
    logits = classify(images, point)
    # In training mode BatchNorm uses the batch's own statistics; over one batch the running ones differ from them by
    # the variance's correction only.
    other = copy.deepcopy(original)
    other.net.load_state_dict({**other.net.state_dict(), **point})
    for module in other.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.train()
    with torch.no_grad():
        expected = other(images)
    assert torch.allclose(logits, expected, rtol=0.05, atol=0.05)
    with torch.no_grad():
        stored = torch.func.functional_call(original, {f"net.{k}": v for k, v in point.items()}, (images,))
    assert not torch.allclose(logits, stored, rtol=0.05, atol=0.05)
    for key, value in original.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_reestimated_statistics_weigh_all_images_alike() -> None:
    class Shifted(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = torch.nn.BatchNorm2d(1)

        def forward(self, images: Tensor, point: dict[str, Tensor]) -> Tensor:
            normalized: Tensor = self.norm(images).flatten(1)
            return normalized

    images = torch.rand(18, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    images[16:] += 10  # a last, smaller batch that differs
    classify = ReestimatedBatchNorm(Shifted(), [(part, torch.zeros(len(part))) for part in images.split(8)])
    classify(images, {})
    assert float(classify.classifier.norm.running_mean) == pytest.approx(float(images.mean()), rel=1e-5)


def test_quality_matches_a_network_with_those_weights() -> None:
    representation = tiny_representation()
    images, labels = torch.rand(10, 1, 8, 8), torch.arange(10) % 10
    batches = list(zip(images.split(4), labels.split(4), strict=True))
    own = representation.layout.weights(representation.target)
    measured = evaluate(representation, own, batches)
    with torch.no_grad():
        logits = representation.original(images)
    assert measured.loss == pytest.approx(float(cross_entropy(logits, labels)), rel=1e-5)
    assert measured.accuracy == pytest.approx(float((logits.argmax(1) == labels).float().mean()))
    plane = random_plane(own, torch.Generator().manual_seed(0))
    grid = loss_grid(representation, plane, [-1.0, 0.0, 1.0], [0.0, 0.5], batches)
    assert [len(row) for row in grid] == [3, 3]
    assert grid[0][1] == measured
    assert grid[1][2] == evaluate(representation, plane.at(1.0, 0.5), batches)
    with pytest.raises(ValueError, match="no images"):
        evaluate(representation, own, [])


def test_where_logits_overflow_no_image_is_right_and_the_loss_is_infinite() -> None:
    batches = [(torch.rand(4, 1, 8, 8), torch.zeros(4, dtype=torch.long))]
    measured = evaluate(lambda images, point: torch.full((len(images), 10), math.nan), {}, batches)
    assert (measured.loss, measured.accuracy) == (math.inf, 0)
    grid = [[Evaluation(1.0, 0.5), measured], [measured, Evaluation(2.0, 0.5)]]
    landscape_figure([0, 1], [0, 1], grid, {"one": (0, 0)}, "test").savefig(io.BytesIO())


def test_a_plane_of_equal_losses_is_drawn() -> None:
    grid = [[Evaluation(1.0, 0.5)] * 2] * 2
    landscape_figure([0, 1], [0, 1], grid, {"one": (0, 0)}, "test").savefig(io.BytesIO())
