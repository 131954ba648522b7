"""Loss and accuracy in weight space: on lines (arXiv 2407.00356, Fig. 9) and planes (Fig. 6 and 7) through solutions.

A *point* in weight space is a mapping from state-dict keys to weights. All points of one analysis have the same keys.
"""

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, final

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from nernlit.analysis.paired import is_correct
from nernlit.errors import UsageError
from nernlit.utilities.progress import counted, progress

Point = Mapping[str, Tensor]
Batches = Iterable[tuple[Tensor, Tensor]]
Classify = Callable[[Tensor, Point], Tensor]


class CountedBatches(Protocol):
    """Batches whose number is known, and which may be read several times."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]: ...

    def __len__(self) -> int: ...


@dataclass(frozen=True)
class Evaluation:
    """Loss and accuracy at one point in weight space.

    Attributes:
        loss: Mean cross-entropy; infinite if logits overflow.
        accuracy: Share of correctly classified images; an image whose logits overflow counts as wrong.
    """

    loss: float
    accuracy: float


@torch.no_grad()
def evaluate(classify: Classify, point: Point, batches: Batches) -> Evaluation:
    """Loss and accuracy at a point.

    Args:
        classify: Maps pixels (B, C, H, W) and a point to logits, as a `Representation` does.
        point: The weights to evaluate.
        batches: Pixels and labels.

    Raises:
        ValueError: If there is no image.
    """
    loss, right, count = 0.0, 0, 0
    for images_BCHW, labels_B in batches:
        logits_BC = classify(images_BCHW, point)
        loss += float(cross_entropy(logits_BC, labels_B, reduction="sum"))
        right += int(is_correct(logits_BC, labels_B).sum())
        count += len(labels_B)
    if not count:
        raise ValueError("no images to measure on.")
    return Evaluation(math.inf if math.isnan(loss) else loss / count, right / count)


@final
class ReestimatedBatchNorm:
    """A classifier whose BatchNorm statistics are estimated again at every point.

    The stored statistics belong to the original's weights. Far from these weights the mismatch of the statistics would
    dominate the loss.

    Args:
        network: Maps pixels and a point to logits, as an original does; it is copied.
        batches: Images of the training split, for the estimate.
    """

    def __init__(self, network: nn.Module, batches: Batches) -> None:
        self.classifier = copy.deepcopy(network)
        self.batches = batches
        self._norms = [m for m in self.classifier.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        if not self._norms:
            raise UsageError("the network has no BatchNorm layers whose statistics could be estimated again.")
        self._measured_at: Point | None = None

    @torch.no_grad()
    def __call__(self, images_BCHW: Tensor, point: Point) -> Tensor:
        """Logits (B, C) of pixels in [0, 1] with the weights of a point."""
        if point is not self._measured_at:
            for norm in self._norms:
                norm.reset_running_stats()
                norm.train()
            count = 0
            for images, _ in self.batches:
                count += len(images)
                for norm in self._norms:
                    norm.momentum = len(images) / count  # so that the average over batches weighs all images alike
                self._run(images, point)
            for norm in self._norms:
                norm.eval()
            self._measured_at = point
        return self._run(images_BCHW, point)

    def _run(self, images_BCHW: Tensor, point: Point) -> Tensor:
        logits: Tensor = self.classifier(images_BCHW, point)
        return logits


def interpolate(start: Point, end: Point, share: float) -> dict[str, Tensor]:
    """The point (1 - share) * start + share * end; shares below 0 and above 1 extrapolate.

    >>> interpolate({"w": torch.tensor(1.0)}, {"w": torch.tensor(3.0)}, 0.25)
    {'w': tensor(1.5000)}
    """
    return {key: torch.lerp(start[key], end[key], share) for key in start}


def distance(start: Point, end: Point) -> float:
    """The Euclidean distance between two points, over all weights."""
    return float(torch.stack([(end[key] - start[key]).double().square().sum() for key in start]).sum().sqrt())


@dataclass(frozen=True)
class Plane:
    """A plane in weight space: the points `origin + x * right + y * up`.

    Attributes:
        origin: The point at (0, 0).
        right: Direction of x.
        up: Direction of y.
        marks: The coordinates (x, y) of the points that define the plane.
    """

    origin: Point
    right: Point
    up: Point
    marks: tuple[tuple[float, float], ...] = ((0.0, 0.0),)

    def at(self, x: float, y: float) -> dict[str, Tensor]:
        """The point with these coordinates."""
        return {key: value + x * self.right[key] + y * self.up[key] for key, value in self.origin.items()}


def plane_through(first: Point, second: Point, third: Point) -> Plane:
    """The plane through three points, with orthonormal directions; the x axis points from the first to the second.

    Raises:
        UsageError: If the three points lie on a line.
    """
    a, b = ({key: (end[key] - first[key]).double() for key in first} for end in (second, third))
    length = _norm(a)
    along = _dot(a, b) / length if length else 0.0
    rest = {key: b[key] - along * a[key] / (length or 1.0) for key in a}
    height = _norm(rest)
    if not length or height < 1e-6 * length:
        raise UsageError("the original and the two runs lie on a line; a plane needs two different runs.")
    right = {key: (value / length).to(first[key].dtype) for key, value in a.items()}
    up = {key: (value / height).to(first[key].dtype) for key, value in rest.items()}
    return Plane(first, right, up, ((0.0, 0.0), (length, 0.0), (along, height)))


def random_plane(point: Point, generator: torch.Generator) -> Plane:
    """A plane of two random directions through a point, with filter normalization.

    Every filter of a direction (every input channel, for a transposed convolution) has the norm of the point's filter,
    so that landscapes of networks with weights of different scale can be compared (Li et al., arXiv 1712.09913, section
    4). As there, entries with one dimension (of normalization layers, biases) stay the same.
    """

    def direction() -> dict[str, Tensor]:
        drawn = {}
        for key, weight in point.items():
            if weight.dim() == 1:
                drawn[key] = torch.zeros_like(weight)
                continue
            noise = torch.randn(weight.shape, generator=generator).to(weight)
            norms = (x.flatten(1).norm(dim=1).view(-1, *[1] * (x.dim() - 1)) for x in (weight, noise))
            own, drawn_norm = norms
            drawn[key] = noise * own / drawn_norm.clamp_min(torch.finfo(weight.dtype).tiny)
        return drawn

    return Plane(point, direction(), direction())


def loss_grid(
    classify: Classify, plane: Plane, xs: Sequence[float], ys: Sequence[float], batches: CountedBatches
) -> list[list[Evaluation]]:
    """Loss and accuracy on a grid of a plane: one row per y, one column per x."""
    grid: list[list[Evaluation]] = []
    points = len(xs) * len(ys)
    with progress(f"measuring {points} points of a plane", points * len(batches)) as advance:
        for y in ys:
            grid.append([])
            for x in xs:
                grid[-1].append(evaluate(classify, plane.at(x, y), counted(batches, advance)))
    return grid


def _dot(a: Point, b: Point) -> float:
    return float(torch.stack([(a[key] * b[key]).sum() for key in a]).sum())


def _norm(a: Point) -> float:
    return math.sqrt(_dot(a, a))
