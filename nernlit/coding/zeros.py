"""The zeros of a pruned network: the predictor does not learn them, and a .nern file says where they are."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from nernlit.errors import LayoutError
from nernlit.kernels import Layout
from nernlit.storage.entropy import Part, decode_weights, encode_weights


def code_zeros(layout: Layout, nonzero: Mapping[str, Tensor]) -> Tensor:
    """The coded positions of zeros, (P,) uint8: at most about a bit per weight, and less where whole kernels are 0.

    Args:
        layout: The predicted weights.
        nonzero: State-dict key -> booleans of the weight's shape.

    >>> layout = Layout([("w", (4, 2, 3, 3))])
    >>> nonzero = {"w": torch.arange(72).view(4, 2, 3, 3) % 5 > 0}
    >>> torch.equal(decode_zeros(layout, code_zeros(layout, nonzero))["w"], nonzero["w"])
    True
    """
    return encode_weights(layout.vector(nonzero).to(torch.int8), _parts(layout))


def decode_zeros(layout: Layout, coded_P: Tensor) -> dict[str, Tensor]:
    """What `code_zeros` coded.

    Raises:
        FileFormatError: If the bytes do not code as many integers as the layout has weights.
        LayoutError: If they code integers other than 0 and 1.
    """
    parts = _parts(layout)
    integers_W = decode_weights(coded_P, parts)
    if bool(((integers_W != 0) & (integers_W != 1)).any()):
        raise LayoutError("the positions of its zeros are damaged: they are not all 0 or 1.")
    counts = [math.prod(part) for part in parts]
    split = zip(layout.layers, integers_W.bool().split(counts), strict=True)
    return {layer.key: values.view(layer.shape) for layer, values in split}


def with_zeros(weights: Mapping[str, Tensor], nonzero: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights, 0 where `nonzero` is False."""
    return {key: weights[key].where(kept, 0) for key, kept in nonzero.items()}


def _parts(layout: Layout) -> list[Part]:
    """Each weight as filters x channels x height x width; further dimensions of a kernel are joined."""
    parts = []
    for layer in layout.layers:
        filters, channels, *kernel = layer.shape
        parts.append((filters, channels, math.prod(kernel[:-1]), kernel[-1] if kernel else 1))
    return parts
