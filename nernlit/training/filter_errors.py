"""The error of whole filters, by the Kronecker-factored Fisher information.

Shapes: N kernels, F filters of all layers, S of them in a step; O filters of a layer, D inputs of a filter.
"""

from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor

from nernlit.errors import DataError, UsageError
from nernlit.kernels import Layout
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


@final
class FilterErrors(WithConstants):
    """Measures the error dW of filters as the mean of w_f |dW_f A^(1/2)|^2, with weights w_f and matrices A of layers.

    Args:
        layout: The layers; without tiles.
        weights: See `filter_weights`.

    Attributes:
        num_filters: F.
    """

    def __init__(self, layout: Layout, weights: FilterWeights) -> None:
        super().__init__()
        self.layout = layout
        for number, layer in enumerate(layout.layers):
            weights_O, root_DD = weights[layer.key]
            self.set_constant(f"weights_{number}", weights_O)
            self.set_constant(f"root_{number}", root_DD)
        filters, channels = (torch.tensor(each) for each in zip(*(x.grid for x in layout.layers), strict=True))
        self._ends_L = filters.cumsum(0)
        self._channels_F = channels.repeat_interleave(filters)
        self._rows_F = self._channels_F.cumsum(0) - self._channels_F  # the first row of each filter
        self.num_filters = len(self._rows_F)
        self._norms: tuple[Tensor, Tensor] | None = None

    def weights(self) -> FilterWeights:
        """What it was made of."""
        return {layer.key: self._of(number) for number, layer in enumerate(self.layout.layers)}

    def _of(self, number: int) -> tuple[Tensor, Tensor]:
        return getattr(self, f"weights_{number}"), getattr(self, f"root_{number}")

    def norms(self, norms_N: Tensor) -> Tensor:
        """The Euclidean norm of each filter (F,), from those of the kernels; both on the CPU."""
        if self._norms is None or self._norms[0] is not norms_N:
            squares_N = norms_N.square()
            of_layers = [squares_N[layer.rows].view(layer.grid).sum(1) for layer in self.layout.layers]
            self._norms = norms_N, torch.cat(of_layers).sqrt()
        return self._norms[1]

    def rows(self, filters_S: Tensor) -> Tensor:
        """The rows of the table of kernels that hold these filters, filter by filter."""
        channels_S = self._channels_F[filters_S]
        first_S = self._rows_F[filters_S] - (channels_S.cumsum(0) - channels_S)
        return first_S.repeat_interleave(channels_S) + torch.arange(int(channels_S.sum()))

    def forward(self, errors_NKK: Tensor, filters_S: Tensor) -> Tensor:
        """The error of some filters in proportion to their number: the sum over all filters is the mean square.

        Args:
            errors_NKK: Predicted minus target kernels in units of the network's scale: the rows that `rows` returns.
            filters_S: The numbers of the filters in ascending order, on the CPU.
        """
        counts_L = torch.searchsorted(filters_S, self._ends_L).diff(prepend=torch.zeros(1, dtype=torch.int64))
        block = (errors_NKK.shape[1], errors_NKK.shape[2])
        total, row, filter_, first = 0 * errors_NKK.sum(), 0, 0, 0  # a process may have no filter
        for number, (layer, count) in enumerate(zip(self.layout.layers, counts_L.tolist(), strict=True)):
            own_S, first = filters_S[filter_ : filter_ + count] - first, first + layer.grid[0]
            if not count:
                continue
            weights_O, root_DD = self._of(number)
            height, width = layer.crop(block)
            rows = count * layer.grid[1]
            errors_SD = errors_NKK[row : row + rows, height, width].reshape(count, -1)
            own_S = own_S.to(weights_O.device)
            total = total + (errors_SD @ root_DD.to(errors_SD)).square().sum(1) @ weights_O[own_S].to(errors_SD)
            row, filter_ = row + rows, filter_ + count
        return total

    def all(self, errors: Mapping[str, Tensor]) -> Tensor:
        """The error of all weights.

        Args:
            errors: State-dict key -> predicted minus target weight, in units of the network's scale.
        """
        terms = []
        for key, (weights_O, root_DD) in self.weights().items():
            errors_OD = errors[key].flatten(1)
            terms.append((errors_OD @ root_DD.to(errors_OD)).square().sum(1) @ weights_O.to(errors_OD))
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
