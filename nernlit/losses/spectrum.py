"""The share of weights' energy in small singular values, as a loss (arXiv 2407.00356, section 6).

Shapes: O filters, I channels, kh x kw kernels; L weights of the same shape; r singular values of the matrix
(O, I * kh * kw).
"""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor


def high_frequency_share(weights: Iterable[Tensor]) -> Tensor:
    """The mean over weights of sum_{i > r/2} s_i^2 / sum_i s_i^2, a scalar with gradients.

    s_1 >= s_2 >= ... are the singular values of a weight reshaped to (O, I * kh * kw). The share does not depend on the
    weight's scale. It is 1 for a weight with a single singular value, and 0 for a weight of zeros.

    Args:
        weights: At least one weight (O, I, kh, kw).

    >>> high_frequency_share([torch.tensor([[3.0, 0.0], [0.0, 4.0]]).view(2, 2, 1, 1)])
    tensor(0.3600)
    """
    by_shape = defaultdict(list)
    for weight in weights:
        matrix = weight.flatten(1)
        by_shape[matrix.shape].append(matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT)
    shares = []
    for group in by_shape.values():
        matrices = torch.stack(group)
        with torch.autocast(matrices.device.type, enabled=False):
            # The squared singular values in ascending order. Unlike those of singular vectors, their gradients are
            # finite for equal values.
            energies_LR = torch.linalg.eigvalsh(matrices @ matrices.mT)
        high = energies_LR.shape[1] - energies_LR.shape[1] // 2
        total_L = energies_LR.sum(1).clamp_min(torch.finfo(energies_LR.dtype).tiny)
        shares.append(energies_LR[:, :high].sum(1) / total_L)
    return torch.cat(shares).mean()
