"""How much there is to store."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

from torch import Tensor

from nernlit.utilities.sharing import distinct_elements


@dataclass(frozen=True)
class Sizes:
    """What there is to store; bytes count 4 per number, and what the network has under several names once.

    Attributes:
        predictor_params: The predictor's parameters.
        predicted_weights: Convolution weights that it stands for.
        cr_paper: The paper's CR: predictor parameters / predicted weights, and nothing else.
        order_bytes: Packed permutations, which a decoder needs too.
        kept_bytes: The original's tensors that are not predicted (linear and normalization layers, statistics).
        cr_stored: (predictor + order + kept) bytes / all of the original's bytes.
    """

    predictor_params: int
    predicted_weights: int
    cr_paper: float
    order_bytes: int
    kept_bytes: int
    cr_stored: float

    @classmethod
    def of(cls, predictor_params: int, predicted_weights: int, order_bytes: int, original: Iterable[Tensor]) -> Self:
        """The sizes of a representation; `original` are all tensors of its original."""
        all_bytes = 4 * distinct_elements(original)
        kept_bytes = all_bytes - 4 * predicted_weights
        return cls(
            predictor_params=predictor_params,
            predicted_weights=predicted_weights,
            cr_paper=predictor_params / predicted_weights,
            order_bytes=order_bytes,
            kept_bytes=kept_bytes,
            cr_stored=(4 * predictor_params + order_bytes + kept_bytes) / all_bytes,
        )
