"""Adversarial attacks on a classifier: FGSM (arXiv 1412.6572) and I-FGSM, its iterated form (arXiv 1607.02533).

Images are pixels in [0, 1]; classifiers normalize them themselves. Shapes: B images, C classes.
"""

import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from nernlit.analysis.paired import is_correct
from nernlit.errors import UsageError, require_positive

Classifier = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Attack:
    """An FGSM or I-FGSM attack of a given strength.

    Attributes:
        eps_255: Largest change of a pixel, in units of 1/255.
        steps: Number of steps: 1 is FGSM, more is I-FGSM.
        step_255: Change per step, in units of 1/255; by default `eps_255` for one step, else a quarter of it.

    >>> Attack(2.0).name, Attack(0.25, steps=10).name
    ('fgsm_2', 'ifgsm_0.25')
    """

    eps_255: float
    steps: int = 1
    step_255: float | None = None

    def __post_init__(self) -> None:
        step_255 = 1.0 if self.step_255 is None else self.step_255
        if not (0 <= self.eps_255 < math.inf and self.steps >= 1 and 0 < step_255 < math.inf):
            raise UsageError(
                f"attack with eps_255={self.eps_255}, steps={self.steps}, step_255={self.step_255}; "
                "expected eps_255 >= 0, at least 1 step and a positive step_255."
            )

    @property
    def name(self) -> str:
        """The attack's name in metric names."""
        return f"{'fgsm' if self.steps == 1 else 'ifgsm'}_{self.eps_255:g}"

    def __call__(self, classify: Classifier, images_BCHW: Tensor, labels_B: Tensor) -> Tensor:
        """The attacked images (B, C, H, W); works inside `inference_mode` if `classify` uses no inference tensors.

        Each step adds step * sign(gradient of the cross-entropy), then clips to the eps-ball and to [0, 1]. The sign is
        exact even if the softmax is saturated. Pixels with a gradient of zero, as before a dead ReLU, do not change.
        """
        if not self.eps_255:
            return images_BCHW
        eps = self.eps_255 / 255
        step = eps / (1 if self.steps == 1 else 4) if self.step_255 is None else self.step_255 / 255
        with torch.inference_mode(False), torch.enable_grad():
            clean, labels_B = images_BCHW.clone(), labels_B.clone()  # a clone is not an inference tensor
            low, high = (clean - eps).clamp_min_(0), (clean + eps).clamp_max_(1)
            attacked = clean
            for _ in range(self.steps):
                attacked = attacked.detach().requires_grad_()
                # A sum, so that an image's gradient does not depend on the batch size.
                loss = _margins(classify(attacked), labels_B).sum()
                (gradient,) = torch.autograd.grad(loss, attacked)
                attacked = torch.clamp(attacked.detach() + step * gradient.sign(), low, high)
        return attacked


def _margins(logits_BC: Tensor, labels_B: Tensor) -> Tensor:
    """Margins (B,): logsumexp of the other classes' logits minus the label's logit.

    The cross-entropy is softplus(margin), so both have the same gradient direction for every image. The gradient of the
    cross-entropy has an additional factor 1 - p(label), which rounds to zero if the classifier is very confident.
    """
    logits_BC, labels_B1 = logits_BC.double(), labels_B[:, None]
    others_BC = logits_BC.scatter(1, labels_B1, -math.inf)
    return others_BC.logsumexp(1) - logits_BC.gather(1, labels_B1)[:, 0]


def count_unchanged(images_BCHW: Tensor, attacked_BCHW: Tensor) -> Tensor:
    """The number of images that an attack did not change."""
    return (images_BCHW == attacked_BCHW).flatten(1).all(1).sum()


def warn_unchanged(attack: Attack, count: int, images: int, of: str = "classifier") -> None:
    """Warn that some images count as robust only because the attack did not change them."""
    if attack.eps_255 and count:
        warnings.warn(
            f"{attack.name} did not change {count:,} of {images:,} images ({count / images:.2%}): the gradient of the "
            f"{of} is zero there. They count as clean images.",
            stacklevel=2,
        )


def accuracy_under(attack: Attack, classify: Classifier, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """The accuracy, in [0, 1], of a classifier on images that are attacked with its own gradients.

    Warns if the attack did not change some of the images.

    Raises:
        ValueError: If there is no image.
    """
    accuracy, still, count = _measure(attack, classify, batches)
    warn_unchanged(attack, still, count)
    return accuracy


def _measure(attack: Attack, classify: Classifier, batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[float, int, int]:
    """The accuracy under attack, the number of unchanged images, and the number of images."""
    right = still = count = 0
    for images_BCHW, labels_B in batches:
        attacked_BCHW = attack(classify, images_BCHW, labels_B)
        right += int(is_correct(classify(attacked_BCHW), labels_B).sum())
        still += int(count_unchanged(images_BCHW, attacked_BCHW))
        count += len(labels_B)
    if not count:
        raise ValueError("no images to attack.")
    return right / count, still, count


def find_eps(
    classify: Classifier,
    batches: Iterable[tuple[Tensor, Tensor]],
    keeps: float,
    steps: int = 1,
    highest_255: float = 16.0,
    tolerance_255: float = 0.01,
) -> float:
    """The eps, in units of 1/255, at which a classifier keeps a given share of its clean accuracy, by bisection.

    Args:
        classify: Maps pixels to logits.
        batches: Images and labels; iterated over once per bisection step, so a list or a loader.
        keeps: Share of the clean accuracy, between 0 and 1.
        steps: Steps of the attack.
        highest_255: Upper end of the search, in units of 1/255.
        tolerance_255: Largest error of the result, in units of 1/255.

    Raises:
        UsageError: If `keeps` is not between 0 and 1, no clean image is classified correctly, or the classifier keeps
            more than this share even at `highest_255`.
    """
    if not 0 < keeps < 1:
        raise UsageError(f"keeps={keeps}; expected a share of the accuracy between 0 and 1.")
    require_positive(highest_255=highest_255, tolerance_255=tolerance_255)
    wanted = keeps * _measure(Attack(0, steps), classify, batches)[0]
    if not wanted:
        raise UsageError("the classifier's clean accuracy is 0, so there is no accuracy to keep a share of.")
    low, high = 0.0, highest_255
    accuracy, still, count = _measure(Attack(high, steps), classify, batches)
    warn_unchanged(Attack(high, steps), still, count)
    if accuracy > wanted:
        raise UsageError(
            f"more than {keeps:.0%} of the accuracy is left at eps = {high:g}/255; pass a larger highest_255."
        )
    while high - low > tolerance_255:
        middle = (low + high) / 2
        if _measure(Attack(middle, steps), classify, batches)[0] > wanted:
            low = middle
        else:
            high = middle
    return (low + high) / 2
