"""The error of whole filters, by the Kronecker-factored Fisher information.

Shapes: N kernels; L layers of a group, O filters of a layer, S of them in a step, D inputs of a filter.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from nernlit.errors import DataError, UsageError
from nernlit.kernels import Layer, Layout, Sampling, derive_seed
from nernlit.originals import Factors
from nernlit.utilities.constants import WithConstants

#: State-dict key -> the weight of each filter (O,), and the matrix (D, D) that its error is multiplied by.
FilterWeights = dict[str, tuple[Tensor, Tensor]]


@torch.no_grad()
def filter_weights(
    layout: Layout,
    factors: Mapping[str, Factors],
    exponent: float,
    learned: Mapping[str, Tensor] | None = None,
) -> FilterWeights:
    """What errors are weighted by: the factors to the power of `exponent`; of that of outputs the diagonal is taken.

    They are scaled so that independent errors of equal variance have their mean square as the error.

    Args:
        layout: The layers.
        factors: State-dict key -> the factors of the layer.
        exponent: See `Sensitivity`.
        learned: State-dict key -> which weights can have errors; None for all.

    Returns:
        Tensors on the CPU.

    Raises:
        DataError: If the factors are not finite, or all 0.
        UsageError: If their powers are.
    """
    traces = torch.stack([factor.trace() for layer in layout.layers for factor in factors[layer.key]])
    if not bool(traces.isfinite().all()) or not bool(traces.any()):
        raise DataError(
            "the sensitivities of the original's weights are all 0, or not finite; check its weights, mean and std, "
            "or pass another kind of sensitivity."
        )
    total = 0.0
    found: FilterWeights = {}
    for layer in layout.layers:
        outputs_OO, inputs_DD = factors[layer.key]
        values_D, vectors_DD = torch.linalg.eigh(inputs_DD.double())
        root_DD = vectors_DD * values_D.clamp_min(0).pow(exponent / 2) @ vectors_DD.T
        weights_O = outputs_OO.double().diagonal().clamp_min(0).pow(exponent)
        of_inputs_D = root_DD.square().sum(0)  # what the squared error of each input's weight counts
        counted_OD = torch.ones(len(weights_O), len(of_inputs_D)) if learned is None else learned[layer.key].flatten(1)
        total += float(weights_O @ counted_OD.to(root_DD) @ of_inputs_D)
        found[layer.key] = weights_O, root_DD
    if not 0 < total < float("inf"):
        raise UsageError(f"sensitivity.exponent={exponent} makes all error weights 0 or infinite; pass a smaller one.")
    return {
        key: ((weights_O / total).float().cpu(), root_DD.float().cpu()) for key, (weights_O, root_DD) in found.items()
    }


@dataclass(frozen=True)
class FilterSample:
    """Filters of a step.

    Attributes:
        filters: For each group of layers the numbers (L, S) of the filters in their layers, on the CPU.
        factors: For each group the number of filters of a layer over the number that all processes sampled.
    """

    filters: list[Tensor] = field(default_factory=list)
    factors: list[float] = field(default_factory=list)


@final
class FilterErrors(WithConstants):
    """Measures the error dW of filters as the mean of w_f |dW_f A^(1/2)|^2, with weights w_f and matrices A of layers.

    Layers with weights of equal shape are a group, whose errors are computed at once.

    Args:
        layout: The layers; without tiles.
        weights: See `filter_weights`.
    """

    def __init__(self, layout: Layout, weights: FilterWeights) -> None:
        super().__init__()
        groups: dict[tuple[int, ...], list[Layer]] = {}
        for layer in layout.layers:
            groups.setdefault(tuple(layer.shape), []).append(layer)
        self._groups = list(groups.values())
        self._cost = sum(layer.kernels / layer.grid[1] ** 0.5 for layer in layout.layers)
        for number, layers in enumerate(self._groups):
            weights_LO, roots_LDD = (torch.stack(each) for each in zip(*(weights[x.key] for x in layers), strict=True))
            self.set_constant(f"weights_{number}", weights_LO)
            self.set_constant(f"roots_{number}", roots_LDD)
        self._norms: tuple[Tensor, list[list[Tensor]]] | None = None

    def _of_groups(self) -> Iterator[tuple[list[Layer], Tensor, Tensor]]:
        for number, layers in enumerate(self._groups):
            yield layers, getattr(self, f"weights_{number}"), getattr(self, f"roots_{number}")

    def weights(self) -> FilterWeights:
        """What it was made of."""
        return {
            layer.key: (weights_O.clone(), root_DD.clone())  # not views, which would be saved with their whole group
            for layers, weights_LO, roots_LDD in self._of_groups()
            for layer, weights_O, root_DD in zip(layers, weights_LO, roots_LDD, strict=True)
        }

    def sample(self, sampling: Sampling, norms_N: Tensor, seed: int, step: int, world_size: int) -> list[FilterSample]:
        """The filters of each process: some of every layer, which together have about `sampling.batch_size` kernels.

        A layer's share is inverse to the square root of the kernels of a filter, because small filters cost less
        (Neyman allocation).

        Args:
            sampling: Chooses filters in each layer.
            norms_N: See `Sampling.shares`, as the other arguments.
        """
        of_all = sampling.batch_size * world_size / self._cost
        samples = [FilterSample() for _ in range(world_size)]
        number = 0
        for layers, norms_LO in zip(self._groups, self._filter_norms(norms_N), strict=True):
            filters, channels = layers[0].grid
            count = max(1, round(of_all / channels**0.5 * filters))
            seeds = (derive_seed(seed, number + layer) for layer in range(len(layers)))
            drawn = [sampling.joint(*each, step, count) for each in zip(norms_LO, seeds, strict=True)]
            joint_LS, number = torch.stack(drawn), number + len(layers)
            for sample, own_LS in zip(samples, joint_LS.tensor_split(world_size, dim=1), strict=True):
                sample.filters.append(own_LS)
                sample.factors.append(filters / joint_LS.shape[1])
        return samples

    def _filter_norms(self, norms_N: Tensor) -> list[list[Tensor]]:
        """The Euclidean norms (O,) of the filters of each layer of each group, from those of the kernels."""
        if self._norms is None or self._norms[0] is not norms_N:
            squares_N = norms_N.square()
            norms = [[squares_N[x.rows].view(x.grid).sum(1).sqrt() for x in layers] for layers in self._groups]
            self._norms = norms_N, norms
        return self._norms[1]

    def rows(self, sample: FilterSample) -> Tensor:
        """The rows of the table of kernels that hold these filters, filter by filter."""
        parts = []
        for layers, filters_LS in zip(self._groups, sample.filters, strict=True):
            channels = layers[0].grid[1]
            first_L11 = torch.tensor([layer.rows.start for layer in layers]).view(-1, 1, 1)
            parts.append((first_L11 + filters_LS[:, :, None] * channels + torch.arange(channels)).flatten())
        return torch.cat(parts)

    def forward(self, errors_NKK: Tensor, sample: FilterSample) -> Tensor:
        """The part of sampled filters in an estimate of the error of all; the parts of all processes add up to it.

        Args:
            errors_NKK: Predicted minus target kernels in units of the network's scale: the rows that `rows` returns.
            sample: The filters.
        """
        block = (errors_NKK.shape[1], errors_NKK.shape[2])
        total, row = 0 * errors_NKK.sum(), 0  # a process may have no filter
        for (layers, weights_LO, roots_LDD), filters_LS, factor in zip(
            self._of_groups(), sample.filters, sample.factors, strict=True
        ):
            rows = filters_LS.numel() * layers[0].grid[1]
            if not rows:
                continue
            height, width = layers[0].crop(block)
            errors_LSD = errors_NKK[row : row + rows, height, width].reshape(*filters_LS.shape, -1)
            weights_LS = weights_LO.to(errors_LSD).gather(1, filters_LS.to(weights_LO.device))
            squares_LS = (errors_LSD @ roots_LDD.to(errors_LSD)).square().sum(2)
            total, row = total + factor * (weights_LS * squares_LS).sum(), row + rows
        return total

    def all(self, errors: Mapping[str, Tensor]) -> Tensor:
        """The error of all weights.

        Args:
            errors: State-dict key -> predicted minus target weight, in units of the network's scale.
        """
        terms = []
        for layers, weights_LO, roots_LDD in self._of_groups():
            errors_LOD = torch.stack([errors[layer.key].flatten(1) for layer in layers])
            squares_LO = (errors_LOD @ roots_LDD.to(errors_LOD)).square().sum(2)
            terms.append((weights_LO.to(errors_LOD) * squares_LO).sum())
        return torch.stack(terms).sum()


def require_filters(layout: Layout) -> None:
    """Refuse layers whose blocks are tiles of several filters.

    Raises:
        UsageError: With their names.
    """
    if tiled := [layer.name for layer in layout.layers if layer.tile is not None]:
        raise UsageError(
            f"sensitivity kronecker weighs the error of each filter, and {tiled[0]!r} is predicted in tiles of "
            "several; pass fisher, or --model.representation.pointwise crop."
        )
