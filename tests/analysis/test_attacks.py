import math
import warnings
from decimal import Decimal, getcontext

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from nernlit.analysis.attacks import Attack, accuracy_under, find_eps
from nernlit.errors import UsageError


def _linear(seed: int = 0) -> Tensor:
    return torch.randn(5, 12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _images(count: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(count, 3, 2, 2, generator=generator, dtype=torch.float64)
    return images, torch.randint(5, (count,), generator=generator)


def _by_hand(matrix: Tensor, image: Tensor, label: int, eps: float, steps: int, step: float) -> Tensor:
    """One image, one pixel after another, with finite differences for the gradient."""

    def loss(pixels: Tensor) -> float:
        logits = matrix @ (pixels.flatten() * pixels.flatten())
        return float(cross_entropy(logits[None], torch.tensor([label])))

    attacked = image.clone()
    for _ in range(steps):
        moved = attacked.clone()
        for place in range(image.numel()):
            bump = torch.zeros_like(image)
            bump.view(-1)[place] = 1e-6
            slope = loss(attacked + bump) - loss(attacked - bump)
            pixel = float(attacked.view(-1)[place]) + step * (slope > 0) - step * (slope < 0)
            clean = float(image.view(-1)[place])
            moved.view(-1)[place] = min(max(pixel, clean - eps, 0.0), clean + eps, 1.0)
        attacked = moved
    return attacked


@pytest.mark.parametrize(
    ("attack", "step"), [(Attack(8.0), 8.0), (Attack(8.0, steps=3), 2.0), (Attack(20.0, steps=4, step_255=13.0), 13.0)]
)
@pytest.mark.parametrize("inference", [False, True])
def test_attacks_match_a_slow_version_with_finite_differences(attack: Attack, step: float, inference: bool) -> None:
    matrix, (images, labels) = _linear(), _images()
    with torch.inference_mode(inference):
        attacked = attack(lambda x: x.flatten(1).square() @ matrix.T, images + 0, labels + 0)
    for number, image in enumerate(images):
        expected = _by_hand(matrix, image, int(labels[number]), attack.eps_255 / 255, attack.steps, step / 255)
        torch.testing.assert_close(attacked[number], expected, rtol=0, atol=1e-12)
    assert not attacked.requires_grad
    assert not attacked.is_inference()


def _exact_signs(matrix: Tensor, image: Tensor, label: int) -> Tensor:
    """The signs of the cross-entropy's gradient of a linear classifier, with 50 digits and exponents without end."""
    getcontext().prec = 50
    rows = [[Decimal(float(value)) for value in row] for row in matrix]
    pixels = [Decimal(float(value)) for value in image.flatten()]
    logits = [sum((a * b for a, b in zip(row, pixels, strict=True)), Decimal(0)) for row in rows]
    powers = [(logit - max(logits)).exp() for logit in logits]
    shares = [power / sum(powers) for power in powers]
    shares[label] = -sum(share for c, share in enumerate(shares) if c != label)  # p - 1
    slopes = [sum(share * row[place] for share, row in zip(shares, rows, strict=True)) for place in range(len(pixels))]
    return torch.tensor([float((slope > 0) - (slope < 0)) for slope in slopes]).view_as(image)


@pytest.mark.parametrize("scale", [1, 300, 3_000])
@pytest.mark.parametrize("steps", [1, 4])
def test_images_move_however_sure_the_classifier_is(scale: int, steps: int) -> None:
    """float32, as networks are; at x300 the cross-entropy's own gradient is zero for most images."""
    matrix = (scale * _linear()).float()
    images, _ = _images(40)
    images = (0.25 + images / 2).float()  # no step reaches the border
    labels = (images.flatten(1) @ matrix.T).argmax(1)
    attack = Attack(2.0, steps)
    with warnings.catch_warnings(action="error"):
        accuracy_under(attack, lambda x: x.flatten(1) @ matrix.T, [(images, labels)])
    attacked = attack(lambda x: x.flatten(1) @ matrix.T, images, labels)
    for image, moved, label in zip(images, attacked, labels, strict=True):
        signs = _exact_signs(matrix, image, int(label))
        assert signs.all()
        if steps == 1:
            torch.testing.assert_close(moved, image + 2 / 255 * signs)
        else:
            assert ((moved - image).abs() <= 2 / 255 + 1e-6).all()
            assert ((moved - image).abs() > 1e-4).any()
    plain = images.clone().requires_grad_()
    cross_entropy(plain.flatten(1) @ matrix.T, labels, reduction="sum").backward()
    assert plain.grad is not None
    still = float((plain.grad == 0).flatten(1).all(1).float().mean())
    assert still == 0 if scale == 1 else still > 0.5


def test_the_direction_is_that_of_the_cross_entropy() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 30), nn.Tanh(), nn.Linear(30, 5)).double()
    images, labels = _images(200)
    images = 0.25 + images / 2
    plain = images.clone().requires_grad_()
    cross_entropy(net(plain), labels, reduction="sum").backward()
    assert plain.grad is not None
    assert torch.equal(Attack(1.0)(net, images, labels), images + 1 / 255 * plain.grad.sign())


def test_images_without_a_direction_are_reported() -> None:
    def blind(x: Tensor) -> Tensor:
        """Dead for dark images."""
        light = (x.flatten(1).mean(1) - 0.5).relu()
        return torch.stack([light, -light], dim=1)

    images = torch.cat([torch.full((3, 1, 2, 2), 0.2), torch.full((5, 1, 2, 2), 0.8)])
    labels = torch.zeros(8, dtype=torch.long)
    message = r"fgsm_1 did not change 3 of 8 images \(37\.50%\): the gradient of the classifier is zero there"
    with pytest.warns(UserWarning, match=message):
        assert accuracy_under(Attack(1.0), blind, [(images, labels)]) == 1
    with warnings.catch_warnings(action="error"):
        accuracy_under(Attack(1.0), blind, [(images[3:], labels[3:])])
        accuracy_under(Attack(0.0), blind, [(images, labels)])


def test_images_with_logits_that_are_not_finite_are_wrong() -> None:
    images, labels = _images(4)

    def broken(x: Tensor) -> Tensor:
        return x.flatten(1)[:, :2] * torch.tensor([math.nan, 1.0])

    assert accuracy_under(Attack(0.0), broken, [(images, torch.zeros_like(labels))]) == 0


def test_attacked_pixels_stay_in_their_ball_and_are_pixels() -> None:
    matrix = _linear()
    images, labels = _images(50)
    images[:25] = images[:25].round()  # at the borders already
    attacked = Attack(30.0, steps=20, step_255=11.0)(lambda x: x.flatten(1) @ matrix.T, images, labels)
    assert attacked.min() >= 0
    assert attacked.max() <= 1
    assert (attacked - images).abs().max() <= 30 / 255 + 1e-12
    assert torch.equal(Attack(0)(lambda x: x.flatten(1) @ matrix.T, images, labels), images)


def test_an_images_attack_does_not_depend_on_its_batch() -> None:
    matrix, (images, labels) = _linear(), _images(7)
    attack = Attack(4.0, steps=5)
    together = attack(lambda x: x.flatten(1) @ matrix.T, images, labels)
    alone = [attack(lambda x: x.flatten(1) @ matrix.T, images[i : i + 1], labels[i : i + 1]) for i in range(7)]
    assert torch.equal(together, torch.cat(alone))


def test_calibration_finds_the_eps_of_a_classifier_whose_margins_are_known() -> None:
    """Brightness tells the class: an image of margin m falls once eps passes m."""
    margins = torch.linspace(0.5, 10.4, 100) / 255
    images = (0.5 + margins).view(-1, 1, 1, 1)
    batches = [(part, torch.zeros(len(part), dtype=torch.long)) for part in images.split(30)]

    def classify(x: Tensor) -> Tensor:
        return torch.stack([x.flatten(1)[:, 0] - 0.5, 0.5 - x.flatten(1)[:, 0]], dim=1)

    assert accuracy_under(Attack(0), classify, batches) == 1
    assert find_eps(classify, batches, keeps=0.7, tolerance_255=0.005) == pytest.approx(3.45, abs=0.06)
    with pytest.raises(UsageError, match=r"more than 70% of the accuracy is left at eps = 2/255"):
        find_eps(classify, batches, keeps=0.7, highest_255=2.0)
    with pytest.raises(UsageError, match=r"keeps=1.5; expected a share"):
        find_eps(classify, batches, keeps=1.5)
    with pytest.raises(UsageError, match=r"tolerance_255=0; expected a finite number above 0"):
        find_eps(classify, batches, keeps=0.7, tolerance_255=0)
    with pytest.raises(UsageError, match="clean accuracy is 0, so there is no accuracy to keep"):
        find_eps(classify, [(images, torch.ones(100, dtype=torch.long))], keeps=0.7)
    with pytest.raises(ValueError, match="no images"):
        accuracy_under(Attack(1), classify, [])


def test_what_is_no_attack_is_refused() -> None:
    nan = float("nan")
    for options in (
        {"eps_255": -1.0},
        {"eps_255": nan},
        {"eps_255": float("inf")},
        {"eps_255": 1.0, "steps": 0},
        {"eps_255": 1.0, "step_255": 0.0},
        {"eps_255": 1.0, "step_255": nan},
    ):
        with pytest.raises(UsageError, match="expected eps_255 >= 0, at least 1 step and a positive step_255"):
            Attack(**options)  # type: ignore[arg-type]
