"""Which entries of the table of kernels a predictor learns.

Shapes: N kernels, K x K size of the predicted kernels, S rows of the table.
"""

import math
from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor

from nernlit.coding import with_zeros
from nernlit.kernels import Layout
from nernlit.utilities.constants import WithConstants


@final
class LearnedEntries(WithConstants):
    """The entries of a table of kernels (N, K, K) that are weights, and those of them that are not kept at 0.

    Args:
        layout: The layout of the table.
        block: Size of the predicted kernels, at least the layout's.
        nonzero: (N, K, K) booleans: the weights that are not kept at 0. None keeps none at 0.
    """

    #: (N, K, K) booleans; see above.
    nonzero: Tensor | None = None
    #: The different masks of weights (M, K, K), booleans, and the number of each kernel's (N,).
    masks: Tensor
    mask_numbers: Tensor

    def __init__(self, layout: Layout, block: tuple[int, int], nonzero: Tensor | None = None) -> None:
        super().__init__()
        self._layout = layout
        masks, numbers = layout.masks(block)
        self.set_constant("masks", masks)
        self.set_constant("mask_numbers", numbers)
        if nonzero is not None:
            self.set_constant("nonzero", nonzero)

    @property
    def keeps_zeros(self) -> bool:
        """Whether some weights are kept at 0."""
        return self.nonzero is not None

    @property
    def count(self) -> int:
        """Number of learned weights."""
        return self._layout.num_weights if self.nonzero is None else int(self.nonzero.sum())

    def per_kernel(self) -> Tensor:
        """(N,) int32: the number of learned weights of each kernel."""
        if self.nonzero is not None:
            return self.nonzero.sum((1, 2), dtype=torch.int32)
        return self.masks.sum((1, 2), dtype=torch.int32)[self.mask_numbers.long()]

    def mask(self, rows_S: Tensor | None = None) -> Tensor | None:
        """(S, K, K) booleans: the learned entries of these rows, by default of all N; None if all entries are."""
        if self.nonzero is not None:
            return self.nonzero if rows_S is None else self.nonzero[rows_S]
        return self.weight_mask(rows_S)

    def weight_mask(self, rows_S: Tensor | None = None) -> Tensor | None:
        """(S, K, K) booleans: the entries that are weights, and not outside of a smaller kernel's crop; None if all."""
        if self._layout.num_weights == self._layout.num_kernels * math.prod(self.masks.shape[1:]):
            return None
        numbers_S = self.mask_numbers if rows_S is None else self.mask_numbers[rows_S]
        return self.masks[numbers_S.long()]

    def with_zeros(self, kernels_SKK: Tensor, rows_S: Tensor | None = None) -> Tensor:
        """The kernels of these rows, by default of all N, with the weights that are kept at 0."""
        if self.nonzero is None:
            return kernels_SKK
        return kernels_SKK.where(self.nonzero if rows_S is None else self.nonzero[rows_S], 0)

    def nonzero_weights(self) -> dict[str, Tensor] | None:
        """State-dict key -> booleans in the weight's shape: the weights that are not kept at 0; None keeps none."""
        return None if self.nonzero is None else self._layout.weights(self.nonzero)

    def weights_with_zeros(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The predicted entries of a state dict, with the weights that are kept at 0."""
        nonzero = self.nonzero_weights()
        return dict(weights) if nonzero is None else with_zeros(weights, nonzero)
