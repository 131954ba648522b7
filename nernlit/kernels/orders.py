"""Orders: greedy nearest-neighbor permutations, after which neighboring kernels of a CNN are similar.

NeRN (arXiv 2212.13554, section 3.2): start from item 0 and append the most similar item not yet used. Similarity is
the cosine; for 1x1 kernels the cosine is always +1 or -1, so minus the squared difference is used instead.

- `in_filter`: the channels within each filter, then the layer's filters (each kernel normalized to length 1).
- `cross_filter`: all O * I kernels of a layer in one permutation.

Shapes: B independent problems, M items, D features; O filters, I channels. Weights are
given as their kernels or tiles. A *permutation* lists item numbers in order; its inverse gives every item's *position*.
Similarities are float64, so that ties break the same way on every machine.
"""

from typing import Literal

import torch
from torch import Tensor

OrderName = Literal["none", "in_filter", "cross_filter"]


def inverse(permutation: Tensor) -> Tensor:
    """The inverse of permutations along the last dimension: the position of every item.

    >>> inverse(torch.tensor([2, 0, 1])).tolist()
    [1, 2, 0]
    """
    steps = torch.arange(permutation.shape[-1], device=permutation.device).expand_as(permutation)
    return torch.empty_like(permutation).scatter_(-1, permutation, steps)


def greedy_order(items_BMD: Tensor, similarity: Literal["cosine", "distance"] = "cosine") -> Tensor:
    """Greedy nearest-neighbor permutations (B, M), each starting from item 0; ties go to the lower item number.

    Args:
        items_BMD: B independent sets of M items with D features.
        similarity: `cosine`, or `distance` for minus the squared difference.

    >>> greedy_order(torch.tensor([[[1.0, 0.0], [-1.0, 0.1], [1.0, 0.2]]])).tolist()
    [[0, 2, 1]]
    """
    from nernlit.kernels.greedy import greedy_walk  # imported here: numba takes half a second to import

    items_BMD = items_BMD.double()
    if similarity == "cosine":
        items_BMD = _unit(items_BMD)
    # -|x - y|^2 = 2xy - |x|^2 - |y|^2, and |x|^2 of the current item is the same for all candidates.
    penalty_BM = items_BMD.square().sum(-1) if similarity == "distance" else torch.zeros(items_BMD.shape[:2])
    problems = zip(items_BMD.numpy(), penalty_BM.double().numpy(), strict=True)
    return torch.stack([torch.from_numpy(greedy_walk(items, penalty)) for items, penalty in problems])


def _unit(vectors: Tensor) -> Tensor:
    unit: Tensor = vectors / vectors.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(vectors.dtype).tiny)
    return unit


def in_filter_order(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The in-filter order of a weight (O, I, kh, kw): permutations of its filters (O,) and of their channels (O, I).

    `channels[f]` lists the channels of filter f. Both permutations hold the weight's own indices.
    """
    kernels_OID = weight.flatten(2).double()
    channels = greedy_order(kernels_OID, _similarity(weight))
    ordered_OID = _unit(kernels_OID).gather(1, channels[..., None].expand_as(kernels_OID))
    return greedy_order(ordered_OID.flatten(1)[None])[0], channels


def cross_filter_order(weight: Tensor) -> Tensor:
    """The cross-filter order of a weight (O, I, kh, kw): one permutation (O * I,) of all its kernels."""
    return greedy_order(weight.flatten(2).flatten(0, 1)[None], _similarity(weight))[0]


def _similarity(weight: Tensor) -> Literal["cosine", "distance"]:
    return "distance" if weight.shape[2:].numel() == 1 else "cosine"


def positions(weight: Tensor, order: OrderName) -> Tensor:
    """The (filter, channel) address of every kernel of a weight (O, I, kh, kw), as (O, I, 2) int64."""
    filters, channels = weight.shape[:2]
    if order == "in_filter":
        filter_order, channel_orders = in_filter_order(weight)
        places = inverse(filter_order)[:, None].expand(filters, channels), inverse(channel_orders)
    else:
        flat = torch.arange(filters * channels)
        if order == "cross_filter":
            flat = inverse(cross_filter_order(weight))
        places = (flat // channels).view(filters, channels), (flat % channels).view(filters, channels)
    return torch.stack(places, dim=-1)
