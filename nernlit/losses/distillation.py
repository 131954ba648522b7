"""Distillation losses: how far one network's answers are from another's.

Shapes: B images, C classes or channels, H x W pixels of a feature map.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import log_softmax, softmax


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
        difference_B = _unit(map_B, epsilon) - _unit(original[name], epsilon)
        terms.append(difference_B.square().sum() / len(map_B))
    return torch.stack(terms).sum()


def _unit(map_B: Tensor, epsilon: float) -> Tensor:
    flat_BF = _at_least_fp32(map_B).flatten(1)
    norms_B1: Tensor = flat_BF.norm(dim=1, keepdim=True)
    return flat_BF / (norms_B1 + epsilon)


def _at_least_fp32(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))
