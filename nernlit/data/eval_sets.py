"""Further test sets beside a dataset's own. Those that need no download are here, the published ones in `ood`.

Each has conditions (`gaussian_noise_3`, ...) and a source of images per condition. `lightning test` measures all of
them and logs a set's mean over its conditions under the set's name.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from typing import NamedTuple, Self, final

from torch import Tensor

from nernlit.data.corruptions import CORRUPTIONS, corrupt
from nernlit.data.sources import ImageSource, TensorImages
from nernlit.errors import UsageError, require_at_least

SEVERITIES = (1, 2, 3, 4, 5)


class EvalSet(ABC):
    """A test set with the same classes as a dataset and other images, such as corrupted ones."""

    __test__ = False  # pytest must not collect it

    #: The labels that occur, if not all do; predictions are then restricted to them.
    classes: Tensor | None = None

    @property
    @abstractmethod
    def name(self) -> str:
        """The set's name in the names of metrics."""

    @abstractmethod
    def conditions(self, clean: ImageSource, num_classes: int) -> dict[str, ImageSource]:
        """A source of images for every condition.

        Args:
            clean: The dataset's own test images.
            num_classes: Number of classes of the dataset.

        Raises:
            DataError: If files are missing or wrong, or belong to other classes.
        """


class EvalCondition(NamedTuple):
    """A condition of a test set.

    Attributes:
        eval_set: The set's name.
        name: The condition's.
        classes: The labels to which predictions are restricted; None for all.
        source: Its images.
    """

    eval_set: str
    name: str
    classes: Tensor | None
    source: ImageSource


def conditions_of(eval_sets: Sequence[EvalSet], clean: ImageSource, num_classes: int) -> list[EvalCondition]:
    """The conditions of all test sets.

    Raises:
        DataError: If a set's files are missing or wrong, or belong to other classes.
        UsageError: If a condition occurs twice.
    """
    found = [
        EvalCondition(eval_set.name, name, eval_set.classes, source)
        for eval_set in eval_sets
        for name, source in eval_set.conditions(clean, num_classes).items()
    ]
    names = [(condition.eval_set, condition.name) for condition in found]
    for test_set_name, name in names:
        if names.count((test_set_name, name)) > 1:
            raise UsageError(f"eval_sets: {test_set_name} {name} occurs twice; each condition may occur only once.")
    return found


def require_known(name: str, corruptions: Sequence[str], known: Collection[str], severities: Sequence[int]) -> None:
    """Check that corruptions and severities are given and known.

    Raises:
        UsageError: If a list is empty or has an unknown entry.
    """
    unknown = [str(x) for x in corruptions if x not in known]
    unknown += [str(x) for x in severities if x not in SEVERITIES]
    if unknown or not corruptions or not severities:
        given = f"has no {', '.join(unknown)}" if unknown else "was given an empty list"
        raise UsageError(f"{name} {given}; expected corruptions out of {', '.join(known)} and severities from 1 to 5.")


@final
class CorruptedImages(ImageSource):
    """The images of another source, corrupted as they are read."""

    def __init__(self, clean: ImageSource, corruption: str, severity: int, seed: int) -> None:
        self.clean, self.corruption, self.severity, self.seed = clean, corruption, severity, seed
        self.labels = clean.labels

    def __getitem__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        images_BCHW, labels_B = self.clean[indices]
        return corrupt(images_BCHW, self.corruption, self.severity, self.seed, indices), labels_B

    def subset(self, indices: Tensor) -> Self:
        raise NotImplementedError("the corruption of an image depends on its index; take the subset before corrupting")

    def in_memory(self) -> TensorImages:
        return TensorImages(self[range(len(self))][0], self.labels)


@final
class Corrupted(EvalSet):
    """The dataset's own test images with this package's corruptions. It differs from CIFAR-C and needs no download.

    Args:
        corruptions: Names out of `nernlit.data.corruptions.CORRUPTIONS`; None takes all.
        severities: Severities, each from 1 to 5.
        seed: Seed of the noise.
    """

    name = "corrupted"

    def __init__(
        self, corruptions: Sequence[str] | None = None, severities: Sequence[int] = SEVERITIES, seed: int = 0
    ) -> None:
        self.corruptions = list(CORRUPTIONS if corruptions is None else corruptions)
        self.severities, self.seed = list(severities), seed
        require_at_least(0, seed=seed)
        require_known("Corrupted", self.corruptions, CORRUPTIONS, self.severities)

    def conditions(self, clean: ImageSource, num_classes: int) -> dict[str, ImageSource]:
        return {
            f"{corruption}_{severity}": CorruptedImages(clean, corruption, severity, self.seed)
            for corruption in self.corruptions
            for severity in self.severities
        }
