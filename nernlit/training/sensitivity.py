"""The option `sensitivity`, and how it computes weights of the squared error of each entry of the kernel table.

Shapes: N kernels, K kernel side.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from nernlit.errors import DataError, UsageError, require_at_least, require_one_of
from nernlit.kernels import derive_seed
from nernlit.originals import (
    Original,
    activation_moments,
    batch_norm_moments,
    fisher_information,
    kronecker_factors,
    require_classifier,
)
from nernlit.representation import Representation
from nernlit.training.filter_errors import FilterWeights, filter_weights, require_filters
from nernlit.utilities.processes import ALONE, Processes
from nernlit.utilities.progress import progress

Kind = Literal["none", "fisher", "kronecker", "activation", "batchnorm"]
#: Options that have no effect with a kind.
_UNUSED: dict[Kind, tuple[str, ...]] = {
    "none": ("exponent", "cap", "num_images", "seed", "image_size"),
    "fisher": ("image_size",),
    "kronecker": ("image_size", "cap"),
    "activation": ("image_size",),
    "batchnorm": ("num_images", "seed"),
}


@dataclass(frozen=True)
class Sensitivity:
    """How much the squared error of each weight counts in reconstruction: its sensitivity to the power of `exponent`.

    Args:
        kind: `none`: all weights count alike. `fisher`: the diagonal Fisher information on training images, with labels
            drawn from the original's own answers. `kronecker`: its Kronecker-factored form for ungrouped 2-dimensional
            convolutions: the errors of a filter's weights count together, by the covariance of the layer's inputs.
            `activation`: the number of the layer's output positions * (BatchNorm factor of the filter)^2 * E[x^2] of
            the input channel, on training images. `batchnorm`: the same by the statistics of BatchNorm layers, without
            images.
        exponent: 0 has the same effect as `none`; 1 takes the sensitivities as they are.
        cap: The largest factor, before factors are scaled to mean 1, as a multiple of their mean; None for no limit.
        num_images: Number of training images for all kinds but `batchnorm`; all, if there are fewer.
        seed: Seed of the choice of these images, and of the labels of `fisher` and `kronecker`. It is separate from the
            run's seed, so that runs with different seeds have the same weights.
        image_size: Height and width in pixels of the images that `batchnorm` counts output positions for; by default
            those that timm states for the network.
    """

    kind: Kind = "none"
    exponent: float = 0.35
    cap: float | None = None
    num_images: int = 1024
    seed: int = 0
    image_size: int | None = None

    def __post_init__(self) -> None:
        require_one_of(Kind, **{"sensitivity.kind": self.kind})
        require_at_least(0, **{"sensitivity.exponent": self.exponent})
        require_at_least(1, **{"sensitivity.num_images": self.num_images})
        require_at_least(0, **{"sensitivity.seed": self.seed})
        if self.cap is not None:
            require_at_least(1, **{"sensitivity.cap": self.cap})
        if self.image_size is not None:
            require_at_least(1, **{"sensitivity.image_size": self.image_size})
        for name in _UNUSED[self.kind]:
            if (value := getattr(self, name)) != getattr(type(self), name):
                raise UsageError(f"sensitivity.{name}={value} has no effect with kind {self.kind}; leave it out.")

    @property
    def needs_images(self) -> bool:
        return self.kind in ("fisher", "kronecker", "activation")

    def require_images(self, original: Original, data: Any) -> None:
        """Check that there are the images that are needed, and that the original can classify them.

        Args:
            original: The original.
            data: The datamodule, or None.

        Raises:
            UsageError: If not, or if the fit is to do without training images.
        """
        if self.needs_images:
            instead = "pass batchnorm, which needs none"
            require_training_images(f"sensitivity {self.kind}", instead, original, data)

    def images(self, data: Any, processes: Processes = ALONE) -> Iterable[Tensor]:
        """Batches of this process's share of the datamodule's training images; none if none are needed."""
        if not self.needs_images:
            return ()
        batches: Iterable[Tensor] = data.training_images(self.num_images, self.seed, processes)
        return batches


def require_training_images(what: str, instead: str, original: Original, data: Any) -> None:
    """Check that a computation has training images, and that the original can classify them.

    Args:
        what: The option that needs them, for the message.
        instead: What to do without images, for the message.
        original: The original.
        data: The datamodule, or None.

    Raises:
        UsageError: If not, or if the fit is to do without training images.
    """
    require_classifier(what, original.name, original.num_classes)
    what = f"{what} needs training images"
    if not getattr(data, "has_images", True):
        raise UsageError(f"{what}, and there are none (`data: null`); name the data (--data CLASS), or {instead}.")
    if getattr(data, "train_on", None) == "noise":
        raise UsageError(f"{what}, and this fit is to use none (--data.train_on noise); {instead}.")
    if not hasattr(data, "training_images"):
        given = "no datamodule" if data is None else type(data).__name__
        raise UsageError(f"{what}, and `fit` was given {given}; pass an ImageDataModule as datamodule, or {instead}.")


#: All weights count alike.
NO_SENSITIVITY = Sensitivity()


def error_weights(
    representation: Representation, option: Sensitivity, images: Iterable[Tensor], processes: Processes = ALONE
) -> Tensor:
    """The weight of the squared error of each entry of the kernel table, (N, K, K) on the CPU.

    Their mean over the entries that are weights of the network is 1; all others are 0.

    Args:
        representation: The representation; its original is run on its own device.
        option: Says what is computed; not `none` and not `kronecker`.
        images: Batches of pixels in [0, 1]: the share of this process.
        processes: The processes that share the images.

    Raises:
        UsageError: If the sensitivities cannot be computed for this network.
        DataError: If they are not finite, or all 0.
    """
    original, keys = representation.original, [layer.key for layer in representation.layout.layers]
    if option.kind == "batchnorm":
        found = batch_norm_moments(original, keys, _image_size(option, original))
    else:
        with _shown(option, processes) as advance:
            batches, seed = _on_device(original, images), derive_seed(option.seed, 1)
            if option.kind == "fisher":
                found = fisher_information(original, keys, batches, seed, advance, processes)
            else:
                found = activation_moments(original, keys, batches, advance, processes)
    return normalized(representation, found, option.exponent, option.cap)


def weights_of_filters(
    representation: Representation, option: Sensitivity, images: Iterable[Tensor], processes: Processes = ALONE
) -> FilterWeights:
    """What `FilterErrors` weighs errors by, for `kronecker`; the arguments are those of `error_weights`.

    Raises:
        UsageError: If the sensitivities cannot be computed for this network.
        DataError: If they are not finite, or all 0.
    """
    original, layout = representation.original, representation.layout
    require_filters(layout)
    keys = [layer.key for layer in layout.layers]
    with _shown(option, processes) as advance:
        batches, seed = _on_device(original, images), derive_seed(option.seed, 1)
        factors = kronecker_factors(original, keys, batches, seed, advance, processes)
    return filter_weights(layout, factors, option.exponent, representation.learned.nonzero_weights())


def _shown(option: Sensitivity, processes: Processes) -> AbstractContextManager[Callable[[int], None]]:
    """The progress of the images of this process."""
    share = math.ceil(option.num_images / processes.world_size)
    return progress(f"sensitivity ({option.kind}) on {option.num_images:,} images", share)


def _on_device(original: Original, images: Iterable[Tensor]) -> Iterator[Tensor]:
    return (batch.to(original.mean.device) for batch in images)


def _image_size(option: Sensitivity, original: Original) -> tuple[int, int]:
    """Height and width of the images that positions are counted for."""
    require_classifier("sensitivity batchnorm", original.name, original.num_classes)
    if option.image_size is not None:
        return option.image_size, option.image_size
    if original.image_size is None:
        raise UsageError(
            f"sensitivity batchnorm: {original.name!r} does not state the size of its images; pass "
            "sensitivity.image_size in pixels."
        )
    return original.image_size


@torch.no_grad()
def normalized(
    representation: Representation, sensitivities: Mapping[str, Tensor], exponent: float, cap: float | None
) -> Tensor:
    """Sensitivities to the power of `exponent`, scaled to mean 1: (N, K, K), 0 for entries that are not learned.

    Args:
        representation: Says where in the table each weight is.
        sensitivities: State-dict key -> values of the weight's shape.
        exponent: See `Sensitivity`.
        cap: See `Sensitivity`.

    Raises:
        DataError: If they are not finite, or all 0.
        UsageError: If their power is.
    """
    layout, mask = representation.layout, representation.learned.mask()
    on_cpu = {key: value.cpu().double() for key, value in sensitivities.items()}
    table_NKK = layout.table(on_cpu, representation.predictor.block)
    total = float(table_NKK.sum())
    if not 0 < total < math.inf:
        raise DataError(
            "the sensitivities of the original's weights are all 0, or not finite; check its weights, mean and std, "
            "or pass another kind of sensitivity."
        )
    weights_NKK = (table_NKK / total).pow(exponent)
    if mask is not None:
        weights_NKK *= mask.cpu()  # 0^0 is 1
    if not 0 < float(weights_NKK.sum()) < math.inf:
        raise UsageError(f"sensitivity.exponent={exponent} makes all error weights 0 or infinite; pass a smaller one.")
    weights_NKK /= weights_NKK.sum() / representation.learned.count
    if cap is not None:
        weights_NKK.clamp_(max=cap)
        weights_NKK /= weights_NKK.sum() / representation.learned.count
    return weights_NKK.float()
