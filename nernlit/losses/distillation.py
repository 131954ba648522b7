"""Distillation losses between a student's and a teacher's logits or feature maps.

Shapes: B images, C classes or channels, H x W pixels of a feature map.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import log_softmax, softmax

_CHUNK_ELEMENTS = 2**17  # elements of each feature map per chunk: a chunk fits into a core's cache


def kd_loss(student_BC: Tensor, teacher_BC: Tensor, temperature: float = 1.0, inside_log: float = 0.0) -> Tensor:
    """KL(softmax(teacher / T) || softmax(student / T)) * T^2, averaged over images (Hinton et al., arXiv 1503.02531).

    Args:
        student_BC: Logits, with gradients.
        teacher_BC: Logits.
        temperature: T; the factor T^2 keeps the scale of the gradients independent of T.
        inside_log: Added to both probabilities inside the logarithms; NeRN's code adds 1e-4 (arXiv 2212.13554).

    Raises:
        ValueError: If the shapes differ; broadcasting would hide the mistake.

    >>> kd_loss(torch.zeros(1, 2), torch.tensor([[0.0, 1000.0]]))
    tensor(0.6931)
    """
    if student_BC.shape != teacher_BC.shape:
        raise ValueError(
            f"student {tuple(student_BC.shape)}, teacher {tuple(teacher_BC.shape)}: expected equal shapes."
        )
    student_BC, teacher_BC = _at_least_fp32(student_BC) / temperature, _at_least_fp32(teacher_BC) / temperature
    teacher_probabilities_BC = softmax(teacher_BC, 1)
    if inside_log:
        log_ratio_BC = (teacher_probabilities_BC + inside_log).log() - (softmax(student_BC, 1) + inside_log).log()
    else:
        log_ratio_BC = log_softmax(teacher_BC, 1) - log_softmax(student_BC, 1)
        # 0 * log 0 is 0: a teacher may exclude classes by logits of minus infinity.
        log_ratio_BC = log_ratio_BC.masked_fill(teacher_BC == -torch.inf, 0)
    return (teacher_probabilities_BC * log_ratio_BC).sum(1).mean() * temperature**2


def feature_map_loss(student: Mapping[str, Tensor], original: Mapping[str, Tensor], epsilon: float = 1e-3) -> Tensor:
    """Squared difference of normalized feature maps, summed over taps, channels and pixels, averaged over images.

    Each image's map is first divided by its Euclidean norm + epsilon: L_FMD as NeRN's code computes it
    (arXiv 2212.13554; arXiv 2407.00356, eq. 1).

    Args:
        student: Tap name -> map (B, C, H, W), with gradients.
        original: The same names and shapes.
        epsilon: Avoids a division by zero for maps of zeros.

    Raises:
        ValueError: If the names or shapes differ.

    >>> feature_map_loss({"a": torch.tensor([[3.0]])}, {"a": torch.tensor([[-5.0]])}, epsilon=0)
    tensor(4.)
    """
    if student.keys() != original.keys():
        unmatched = sorted(student.keys() ^ original.keys())
        raise ValueError(f"taps {', '.join(unmatched[:5])} are in only one of the two: expected the same taps.")
    terms = []
    for name, map_B in student.items():
        if map_B.shape != original[name].shape:
            raise ValueError(
                f"tap {name!r}: student {tuple(map_B.shape)}, original {tuple(original[name].shape)}; "
                "expected equal shapes."
            )
        pair = (map_B, original[name])
        if map_B.dim() == 4 and map_B.is_contiguous(memory_format=torch.channels_last):
            pair = (map_B.permute(0, 2, 3, 1), original[name].permute(0, 2, 3, 1))  # flattened below without a copy
        terms.append(_UnitDistance.apply(*(x.flatten(1) for x in pair), epsilon).mean())
    return torch.stack(terms).sum()


class _UnitDistance(torch.autograd.Function):
    """|a / (|a| + epsilon) - b / (|b| + epsilon)|^2 of every row; gradients flow to a only.

    A network's feature maps take hundreds of megabytes, and autograd would read them many times. Here the forward pass
    reads a and b once, for their inner products, and saves no other intermediate result. The gradient is a weighted sum
    of a and b with two factors per row. Rows are converted to float32 first, because products of mixed types are not
    vectorized.
    """

    @staticmethod
    def forward(ctx: Any, a_BF: Tensor, b_BF: Tensor, epsilon: float) -> Tensor:
        grams = []
        for a, b in _in_parts(a_BF, b_BF):
            pair_B2F = _at_least_fp32(torch.stack([a, b], 1))
            with torch.autocast(a.device.type, enabled=False):  # bf16 is too coarse for small differences
                grams.append(pair_B2F @ pair_B2F.mT)
        gram_B22 = torch.cat(grams)
        norms_B2 = gram_B22.diagonal(dim1=1, dim2=2).sqrt()
        units_B2 = 1 / (norms_B2 + epsilon)
        # With the normalized rows x and y: |x - y|^2 = |x|^2 + |y|^2 - 2 xy.
        own_B, other_B = (norms_B2 * units_B2).square().unbind(1)
        product_B = gram_B22[:, 0, 1] * units_B2.prod(1)
        ctx.save_for_backward(a_BF, b_BF, norms_B2, units_B2, own_B - product_B)
        return (own_B + other_B - 2 * product_B).clamp_min(0)

    @staticmethod
    def backward(ctx: Any, grad_B: Tensor) -> tuple[Tensor, None, None]:
        a_BF, b_BF, norms_B2, units_B2, excess_B = ctx.saved_tensors
        (norm_a_B, _), (unit_a_B, unit_b_B) = norms_B2.unbind(1), units_B2.unbind(1)
        along_B = torch.where(norm_a_B > 0, unit_a_B * excess_B / norm_a_B, 0)
        factor_a_B1 = (2 * grad_B * (unit_a_B.square() - along_B))[:, None]
        factor_b_B1 = (-2 * grad_B * unit_a_B * unit_b_B)[:, None]
        gradient_BF = torch.empty_like(a_BF)
        for gradient, a, s, b, t in _in_parts(gradient_BF, a_BF, factor_a_B1, b_BF, factor_b_B1):
            gradient.copy_(torch.mul(_at_least_fp32(a), s).addcmul_(_at_least_fp32(b), t))
        return gradient_BF, None, None


def _in_parts(first: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Chunks of rows of all tensors together."""
    rows = max(1, _CHUNK_ELEMENTS // first.shape[1])
    return zip(*(x.split(rows) for x in (first, *others)), strict=True)


def _at_least_fp32(values: Tensor) -> Tensor:
    converted: Tensor = values.to(torch.promote_types(values.dtype, torch.float32))
    return converted
