"""Attacks on a classifier: FGSM (arXiv 1412.6572) and its iterated form (arXiv 1607.02533).

Everything happens in pixels of [0, 1]; classifiers normalise them themselves. Shapes: B images, C classes.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from nernlit.errors import UsageError

Classifier = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Attack:
    """How strongly, and in how many steps, pixels are moved against a classifier.

    Attributes:
        eps_255: Largest change of a pixel, in 1/255.
        steps: 1 is FGSM; more is I-FGSM.
        step_255: Change in one step, in 1/255; `eps_255` for one step, a quarter of it for several.

    >>> Attack(2.0).name, Attack(0.25, steps=10).name
    ('fgsm_2', 'ifgsm_0.25')
    """

    eps_255: float
    steps: int = 1
    step_255: float | None = None

    def __post_init__(self) -> None:
        if self.eps_255 < 0 or self.steps < 1 or (self.step_255 is not None and self.step_255 <= 0):
            raise UsageError(
                f"attack with eps_255={self.eps_255}, steps={self.steps}, step_255={self.step_255}; "
                "expected eps_255 >= 0, at least 1 step and a positive step_255."
            )

    @property
    def name(self) -> str:
        """As it stands in a metric's name."""
        return f"{'fgsm' if self.steps == 1 else 'ifgsm'}_{self.eps_255:g}"

    def __call__(self, classify: Classifier, images_BCHW: Tensor, labels_B: Tensor) -> Tensor:
        """The attacked images; works inside `inference_mode` too, if `classify` uses no inference tensors.

        Every step adds step * sign(gradient of the cross-entropy), then returns to the eps-ball and to [0, 1].
        """
        if not self.eps_255:
            return images_BCHW
        eps = self.eps_255 / 255
        step = eps / (1 if self.steps == 1 else 4) if self.step_255 is None else self.step_255 / 255
        with torch.inference_mode(False), torch.enable_grad():
            clean, labels_B = images_BCHW.clone(), labels_B.clone()  # clones of inference tensors are ordinary ones
            low, high = (clean - eps).clamp_min_(0), (clean + eps).clamp_max_(1)
            attacked = clean
            for _ in range(self.steps):
                attacked = attacked.detach().requires_grad_()
                # A sum: an image's gradient does not depend on how many others are in the batch.
                loss = cross_entropy(classify(attacked), labels_B, reduction="sum")
                (gradient,) = torch.autograd.grad(loss, attacked)
                attacked = torch.clamp(attacked.detach() + step * gradient.sign(), low, high)
        return attacked


def accuracy_under(attack: Attack, classify: Classifier, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """The share of images that a classifier still gets right when it is attacked itself.

    Raises:
        ValueError: If there is no image.
    """
    right = count = 0
    for images_BCHW, labels_B in batches:
        answers_B = classify(attack(classify, images_BCHW, labels_B)).argmax(1)
        right += int((answers_B == labels_B).sum())
        count += len(labels_B)
    if not count:
        raise ValueError("no images to attack.")
    return right / count


def calibrate(
    classify: Classifier,
    batches: Iterable[tuple[Tensor, Tensor]],
    keeps: float,
    steps: int = 1,
    highest_255: float = 16.0,
    tolerance_255: float = 0.01,
) -> float:
    """The eps, in 1/255, at which a classifier keeps a given share of its clean accuracy, by bisection.

    Args:
        classify: Pixels to logits.
        batches: Images and labels; walked over once a bisection, so a list or a loader.
        keeps: Share of the clean accuracy, between 0 and 1.
        steps: Of the attack.
        highest_255: Where the search begins.
        tolerance_255: How exact the answer must be.

    Raises:
        UsageError: If `keeps` is no share, or the classifier keeps more even at `highest_255`.
    """
    if not 0 < keeps < 1:
        raise UsageError(f"keeps={keeps}; expected a share of the accuracy between 0 and 1.")
    wanted = keeps * accuracy_under(Attack(0, steps), classify, batches)
    low, high = 0.0, highest_255
    if accuracy_under(Attack(high, steps), classify, batches) > wanted:
        raise UsageError(f"more than {keeps:.0%} of the accuracy is left at eps = {high:g}/255; pass a larger one.")
    while high - low > tolerance_255:
        middle = (low + high) / 2
        if accuracy_under(Attack(middle, steps), classify, batches) > wanted:
            low = middle
        else:
            high = middle
    return (low + high) / 2
