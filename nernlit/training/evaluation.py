"""The accuracy of classifiers on images, and errors for logits that are not finite.

Batches are (pixels in [0, 1] of shape (B, C, H, W), labels (B,)).
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot
from torchmetrics.classification import MulticlassAccuracy

from nernlit.errors import DataError, UsageError
from nernlit.originals import require_pixels
from nernlit.training.batches import images_of, labels_of

ImageBatch = tuple[Tensor, Tensor]
Classifiers = Mapping[str, Callable[[Tensor], Tensor]]


class Evaluation:
    """Counts the correctly classified images of one or more classifiers on the same images.

    Metrics are `acc`, `acc_top5`, `acc_<set>_<condition>` and their mean `acc_<set>`; each name ends in the
    classifier's suffix.

    Args:
        classifiers: Suffix of the metrics' names -> classifier, which maps pixels to logits.
        finite: Suffix -> whether the weights of this classifier are finite, where they are predicted.
        num_classes: Number of logits.
        in_chans: Image channels.
        conditions: The conditions of further test sets, one per data loader after the first.
        device: The device of the logits.

    Raises:
        UsageError: If two metrics would have the same name.
    """

    def __init__(
        self,
        classifiers: Classifiers,
        finite: Mapping[str, Tensor],
        num_classes: int,
        in_chans: int,
        conditions: Sequence[Any],
        device: torch.device,
    ) -> None:
        self.classifiers, self.num_classes, self.in_chans = classifiers, num_classes, in_chans
        self.conditions, self.device = conditions, device
        self.finite = finite
        self._is_first = True
        #: Whether all logits of a classifier have been finite so far.
        self.finite_logits: dict[str, Tensor] = {}
        names = [f"acc{_suffix(condition)}" for condition in conditions]
        means = {f"acc_{condition.eval_set}" for condition in conditions}
        results = Counter(name + suffix for name in ("acc", "acc_top5", *names, *means) for suffix in classifiers)
        for name, count in results.items():
            if count > 1:
                raise UsageError(f"eval_sets: two results would be named {name}; rename the test set or its condition.")
        tops = {"acc": 1, "acc_top5": min(5, num_classes), **dict.fromkeys(names, 1)}
        #: Not a ModuleDict, whose names must not contain dots (as in "cifar10.1").
        self.metrics = {
            name + suffix: MulticlassAccuracy(num_classes, top_k=top, average="micro").to(device)
            for name, top in tops.items()
            for suffix in classifiers
        }

    def update(self, batch: ImageBatch, dataloader_idx: int = 0) -> None:
        """Count the predictions for a batch. An image with logits that are not finite counts as wrong.

        Raises:
            DataError: If it is no batch of images and labels, the images do not have the classifiers' number of
                channels, or the first images are not in [0, 1].
        """
        if not self.classifiers:
            return  # no images, no accuracy
        images_BCHW, labels_B = images_of(batch), labels_of(batch, self.num_classes)
        if self._is_first:
            require_pixels(images_BCHW)
            self._is_first = False
        if images_BCHW.shape[1] != self.in_chans:
            raise DataError(
                f"images of {images_BCHW.shape[1]} channels, but the original takes {self.in_chans}; "
                "use a subclass of ImageDataModule, which converts them, or convert them before."
            )
        condition = self.conditions[dataloader_idx - 1] if dataloader_idx else None
        names = [f"acc{_suffix(condition)}"] if condition else ["acc", "acc_top5"]
        for suffix, classify in self.classifiers.items():
            logits_BC = classify(images_BCHW)
            finite_B = logits_BC.isfinite().all(1)
            self.finite_logits[suffix] = finite_B.all() & self.finite_logits.get(suffix, True)
            # Non-finite rows become logits whose smallest entry is the label, so that the image counts as wrong.
            logits_BC = logits_BC.where(finite_B[:, None], -one_hot(labels_B, self.num_classes).to(logits_BC))
            if condition is not None and condition.classes is not None:
                logits_BC = _mask_other_classes(logits_BC, condition.classes)
            for name in names:
                self.metrics[name + suffix].update(logits_BC, labels_B)

    def flags(self, joined: Callable[[Tensor], Tensor]) -> dict[str, tuple[bool, bool]]:
        """Suffix -> whether the classifier's weights are finite, and whether all of its logits are.

        Args:
            joined: Maps flags (0 or 1) of this process to those of all processes.
        """
        suffixes = list(self.classifiers or self.finite)  # without images only the weights are checked
        unseen = torch.ones((), dtype=torch.bool, device=self.device)  # a process may have no images
        flags_S2 = torch.stack(
            [
                torch.stack([found.get(suffix, unseen).int() for found in (self.finite, self.finite_logits)])
                for suffix in suffixes
            ]
        )
        found = zip(suffixes, joined(flags_S2).tolist(), strict=True)
        return {suffix: (bool(finite), bool(finite_logits)) for suffix, (finite, finite_logits) in found}

    def results(self, suffixes: Iterable[str]) -> dict[str, Tensor]:
        """The metrics of the classifiers with these suffixes; equal on all processes."""
        results: dict[str, Tensor] = {}
        for suffix in suffixes:
            by_set = defaultdict(list)
            for condition in self.conditions:
                name = f"acc{_suffix(condition)}{suffix}"
                value = results[name] = self.metrics[name].compute()
                by_set[condition.eval_set].append(value)
            results |= {f"acc_{name}{suffix}": torch.stack(values).mean() for name, values in by_set.items()}
            results |= {name: self.metrics[name].compute() for name in (f"acc{suffix}", f"acc_top5{suffix}")}
        return results


def _suffix(condition: Any) -> str:
    return f"_{condition.eval_set}_{condition.name}"


def _mask_other_classes(logits_BC: Tensor, classes: Tensor) -> Tensor:
    """The logits; those of classes that the test set does not have are set to minus infinity."""
    kept_BC = torch.full_like(logits_BC, float("-inf"))
    kept_BC[:, classes] = logits_BC[:, classes.to(logits_BC.device)]
    return kept_BC
