"""Distillation losses: how far one network's answers are from another's.

Shapes: B images, C classes or channels, H x W pixels of a feature map.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import log_softmax, softmax

_ROWS = 16  # of a feature map at a time: they fit into a core's cache


def kd_loss(student_BC: Tensor, teacher_BC: Tensor, temperature: float = 1.0, inside_log: float = 0.0) -> Tensor:
    """KL(softmax(teacher / T) || softmax(student / T)) * T^2, the mean over images (Hinton et al., arXiv 1503.02531).

    Args:
        student_BC: Logits, with gradients.
        teacher_BC: Logits.
        temperature: T; the factor T^2 keeps gradients comparable.
        inside_log: Added to both probabilities inside the logarithm; NeRN's code adds 1e-4 (arXiv 2212.13554).

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
    share_BC = softmax(teacher_BC, 1)
    if inside_log:
        gap_BC = (share_BC + inside_log).log() - (softmax(student_BC, 1) + inside_log).log()
    else:
        gap_BC = log_softmax(teacher_BC, 1) - log_softmax(student_BC, 1)
    return (share_BC * gap_BC).sum(1).mean() * temperature**2


def feature_map_loss(student: Mapping[str, Tensor], original: Mapping[str, Tensor], epsilon: float = 1e-3) -> Tensor:
    """Squared difference of feature maps, summed over taps and everything in them, divided by the number of images.

    Every image's map is divided by its own Euclidean norm + epsilon first: L_FMD of NeRN's code (arXiv 2212.13554;
    arXiv 2407.00356, eq. 1).

    Args:
        student: Tap's name -> map (B, C, H, W), with gradients.
        original: Likewise, of the same names and shapes.
        epsilon: Keeps dead maps finite.

    Raises:
        ValueError: If names or shapes differ.

    >>> feature_map_loss({"a": torch.tensor([[3.0]])}, {"a": torch.tensor([[-5.0]])}, epsilon=0)
    tensor(4.)
    """
    if student.keys() != original.keys():
        odd = sorted(student.keys() ^ original.keys())
        raise ValueError(f"taps {', '.join(odd[:5])} are in one of the two only: expected the same taps.")
    terms = []
    for name, map_B in student.items():
        if map_B.shape != original[name].shape:
            raise ValueError(
                f"tap {name!r}: student {tuple(map_B.shape)}, original {tuple(original[name].shape)}; "
                "expected equal shapes."
            )
        pair = (map_B, original[name])
        if map_B.dim() == 4 and map_B.is_contiguous(memory_format=torch.channels_last):
            pair = (map_B.permute(0, 2, 3, 1), original[name].permute(0, 2, 3, 1))  # rows without a copy
        terms.append(_UnitDistance.apply(*(x.flatten(1) for x in pair), epsilon).mean())
    return torch.stack(terms).sum()


class _UnitDistance(torch.autograd.Function):
    """|a / (|a| + epsilon) - b / (|b| + epsilon)|^2 of every row; gradients to a alone.

    A network's maps are hundreds of megabytes, and autograd would walk over them three times as often. Here the forward
    pass keeps no more than a and b, and the gradient is a sum of the two with one factor each a row. Rows are converted
    first: products of mixed types are not vectorised.
    """

    @staticmethod
    def forward(ctx: Any, a_BF: Tensor, b_BF: Tensor, epsilon: float) -> Tensor:
        rows = []
        for a, b in zip(*(map(_at_least_fp32, x.split(_ROWS)) for x in (a_BF, b_BF)), strict=True):
            norm_a, norm_b = (torch.linalg.vector_norm(x, dim=1, keepdim=True) for x in (a, b))
            difference = torch.mul(a, 1 / (norm_a + epsilon)).addcmul_(b, 1 / (norm_b + epsilon), value=-1)
            rows.append(torch.cat([norm_a, norm_b, torch.linalg.vector_norm(difference, dim=1, keepdim=True)], 1))
        norm_a_B1, norm_b_B1, distance_B1 = torch.cat(rows).split(1, dim=1)
        ctx.epsilon = epsilon
        ctx.save_for_backward(a_BF, b_BF, norm_a_B1, norm_b_B1, distance_B1)
        squared_B: Tensor = distance_B1.square().squeeze(1)
        return squared_B

    @staticmethod
    def backward(ctx: Any, grad_B: Tensor) -> tuple[Tensor, None, None]:
        a_BF, b_BF, norm_a_B1, norm_b_B1, distance_B1 = ctx.saved_tensors
        unit_a_B1, unit_b_B1 = 1 / (norm_a_B1 + ctx.epsilon), 1 / (norm_b_B1 + ctx.epsilon)
        # With x and y the divided rows: |x - y|^2 = |x|^2 + |y|^2 - 2 xy.
        own_B1 = (norm_a_B1 * unit_a_B1).square()
        product_B1 = (own_B1 + (norm_b_B1 * unit_b_B1).square() - distance_B1.square()) / 2
        along_B1 = torch.where(norm_a_B1 > 0, unit_a_B1 * (own_B1 - product_B1) / norm_a_B1, 0)
        factor_a_B1 = 2 * grad_B[:, None] * (unit_a_B1.square() - along_B1)
        factor_b_B1 = -2 * grad_B[:, None] * unit_a_B1 * unit_b_B1
        gradient_BF = torch.empty_like(a_BF)
        rows = zip(*(x.split(_ROWS) for x in (gradient_BF, a_BF, factor_a_B1, b_BF, factor_b_B1)), strict=True)
        for gradient, a, s, b, t in rows:
            gradient.copy_(torch.mul(_at_least_fp32(a), s).addcmul_(_at_least_fp32(b), t))
        return gradient_BF, None, None


def _at_least_fp32(values: Tensor) -> Tensor:
    converted: Tensor = values.to(torch.promote_types(values.dtype, torch.float32))
    return converted
