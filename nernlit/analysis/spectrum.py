"""The distribution of a layer's energy over its singular values (arXiv 2407.00356, Fig. 2 and 8).

Shapes: O filters, I channels, kh x kw kernels; a weight is reshaped to (O, I * kh * kw), which has r singular values.
A transposed convolution's weight is (I, O, kh, kw), and its rows are its input channels.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from nernlit.analysis.finite import require_finite
from nernlit.representation import Representation
from nernlit.utilities.processes import ALONE, Processes
from nernlit.utilities.progress import progress


@dataclass(frozen=True)
class LayerEnergy:
    """One layer's low-frequency energy.

    Attributes:
        name: Module name.
        original: Low-frequency share of the original weight's energy.
        reconstructed: Low-frequency share of the reconstructed weight's energy.
    """

    name: str
    original: float
    reconstructed: float

    @property
    def difference(self) -> float:
        """Reconstructed minus original: positive if the predictor has smoothed the weight."""
        return self.reconstructed - self.original


@torch.no_grad()
def low_frequency_energy(weights: Mapping[str, Tensor], processes: Processes = ALONE) -> dict[str, float]:
    """The share of every weight's energy in the larger half of its singular values: sum_{i <= r/2} s_i^2 / sum_i s_i^2.

    Weights (O, I, kh, kw) of the same shape are decomposed in one batch, in float64. The share is NaN for a weight of
    zeros, and 0 for a weight with a single singular value (one filter), whose first half is empty.

    Args:
        weights: Name -> weight.
        processes: The processes that share the decompositions; all of them call this with the same weights.

    Raises:
        UsageError: If a weight is not finite.

    >>> low_frequency_energy({"w": torch.tensor([[3.0, 0.0], [0.0, 4.0]]).view(2, 2, 1, 1)})
    {'w': 0.64}
    """
    require_finite(weights)
    keys = list(weights)
    # The most expensive decompositions first, so that the processes get similar amounts of work.
    by_cost = sorted(range(len(keys)), key=lambda row: weights[keys[row]].numel(), reverse=True)
    by_shape = defaultdict(list)
    for row in by_cost[processes.rank :: processes.world_size]:
        weight = weights[keys[row]]
        by_shape[len(weight), weight[0].numel()].append(row)
    device = next(iter(weights.values())).device
    shares_L = torch.zeros(len(keys), dtype=torch.float64, device=device)
    own = sum(len(rows) for rows in by_shape.values())
    with progress(f"singular values of {own} weights", own) as advance:
        for rows in by_shape.values():
            matrices = torch.stack([weights[keys[row]].flatten(1) for row in rows]).double()
            energies_LR = torch.linalg.svdvals(matrices).square()
            shares_L[rows] = energies_LR[:, : energies_LR.shape[1] // 2].sum(1) / energies_LR.sum(1)
            advance(len(rows))
    return dict(zip(keys, processes.total(shares_L).tolist(), strict=True))


@torch.no_grad()
def layer_energies(representation: Representation, processes: Processes = ALONE) -> list[LayerEnergy]:
    """The low-frequency energy of every predicted layer, in the network's order.

    Args:
        representation: The representation.
        processes: The processes that share the work; all of them call this with the same representation.
    """
    original = low_frequency_energy(representation.original_weights(), processes)
    reconstructed = low_frequency_energy(representation.weights(), processes)
    return [
        LayerEnergy(layer.name, original[layer.key], reconstructed[layer.key]) for layer in representation.layout.layers
    ]
