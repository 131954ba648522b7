import math

import pytest
import torch

from nernlit.losses import feature_map_loss, kd_loss


def _softmax(values: list[float]) -> list[float]:
    powers = [math.exp(value) for value in values]
    return [power / sum(powers) for power in powers]


@pytest.mark.parametrize(("temperature", "inside_log"), [(1.0, 0.0), (4.0, 0.0), (1.0, 1e-4)])
def test_kd_matches_the_definition_number_by_number(temperature: float, inside_log: float) -> None:
    student, teacher = torch.randn(5, 7, dtype=torch.float64), torch.randn(5, 7, dtype=torch.float64)
    total = 0.0
    for row_s, row_t in zip(student.tolist(), teacher.tolist(), strict=True):
        p = _softmax([value / temperature for value in row_t])
        q = _softmax([value / temperature for value in row_s])
        total += sum(a * math.log((a + inside_log) / (b + inside_log)) for a, b in zip(p, q, strict=True))
    expected = total / 5 * temperature**2
    assert float(kd_loss(student, teacher, temperature, inside_log)) == pytest.approx(expected, rel=1e-4)


def test_kd_is_zero_for_equal_logits_and_blind_to_a_shift() -> None:
    logits = torch.randn(4, 3)
    assert float(kd_loss(logits + 2.5, logits)) == pytest.approx(0, abs=1e-6)
    other = torch.randn(4, 3)
    assert float(kd_loss(other + 7, logits)) == pytest.approx(float(kd_loss(other, logits)), rel=1e-4)


def test_feature_maps_match_the_definition_number_by_number() -> None:
    student = {"a": torch.randn(3, 2, 4, 4), "b": torch.randn(3, 5)}
    original = {"a": torch.randn(3, 2, 4, 4), "b": torch.randn(3, 5)}
    total = 0.0
    for name in student:
        for s, o in zip(student[name].flatten(1).tolist(), original[name].flatten(1).tolist(), strict=True):
            norm_s, norm_o = math.sqrt(sum(v * v for v in s)) + 1e-3, math.sqrt(sum(v * v for v in o)) + 1e-3
            total += sum((a / norm_s - b / norm_o) ** 2 for a, b in zip(s, o, strict=True))
    assert float(feature_map_loss(student, original)) == pytest.approx(total / 3, rel=1e-5)


def test_feature_maps_are_compared_by_direction() -> None:
    maps = {"a": torch.randn(2, 3, 4, 4)}
    scaled = {"a": 5 * maps["a"]}
    assert float(feature_map_loss(scaled, maps)) == pytest.approx(0, abs=1e-6)
    dead = {"a": torch.zeros(2, 3, 4, 4, requires_grad=True)}
    feature_map_loss(dead, maps).backward()
    assert dead["a"].grad is not None
    assert torch.isfinite(dead["a"].grad).all()


@pytest.mark.parametrize("images", [1, 37])
def test_feature_maps_gradient_is_that_of_the_definition(images: int) -> None:
    def slow(student: torch.Tensor) -> torch.Tensor:
        s, o = (x / (x.norm(dim=1, keepdim=True) + 1e-3) for x in (student.flatten(1), original.flatten(1)))
        return (s - o).square().sum() / images

    original = torch.randn(images, 3, 4, 4, dtype=torch.float64)
    student = torch.randn(images, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(slow(student), student)
    (gradient,) = torch.autograd.grad(feature_map_loss({"a": student}, {"a": original}, epsilon=1e-3), student)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("autocast", [False, True])
def test_feature_maps_that_nearly_agree_keep_their_difference(autocast: bool) -> None:
    original = torch.randn(4, 2_000)
    student = original + 0.01 * torch.randn(4, 2_000)
    exact = {"a": student.double().requires_grad_()}
    feature_map_loss(exact, {"a": original.double()}).backward()
    given = {"a": student.clone().requires_grad_()}
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = feature_map_loss(given, {"a": original})
    loss.backward()
    torch.testing.assert_close(loss.double(), feature_map_loss(exact, {"a": original.double()}), rtol=0.02, atol=0)
    assert exact["a"].grad is not None
    assert given["a"].grad is not None
    error = (given["a"].grad - exact["a"].grad).norm() / exact["a"].grad.norm()
    assert float(error) < 1e-4


def test_what_does_not_match_is_refused() -> None:
    with pytest.raises(ValueError, match=r"student \(2, 3\), teacher \(2, 4\): expected equal shapes"):
        kd_loss(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="taps a, b are in only one of the two"):
        feature_map_loss({"a": torch.zeros(1, 1)}, {"b": torch.zeros(1, 1)})
    with pytest.raises(ValueError, match=r"tap 'a': student \(1, 1\), original \(1, 2\)"):
        feature_map_loss({"a": torch.zeros(1, 1)}, {"a": torch.zeros(1, 2)})


def test_classes_that_the_teacher_excludes_count_as_zero() -> None:
    student = torch.zeros(1, 3, requires_grad=True)
    loss = kd_loss(student, torch.tensor([[0.0, 1.0, -torch.inf]]))
    p = _softmax([0.0, 1.0])
    assert float(loss.detach()) == pytest.approx(sum(each * math.log(3 * each) for each in p), rel=1e-5)
    loss.backward()
    assert student.grad is not None
    assert bool(student.grad.isfinite().all())
