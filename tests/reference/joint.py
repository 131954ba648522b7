"""One whole step of Baseline-joint on the digits CNN, slow and plain: float64, everything written out.

Takes weights and gives the loss terms and the gradients of the predictor's parameters. Shares nothing with the package.
"""

import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad

from tests.reference.slow import encode


def predict(parameters: list[Tensor], address: tuple[int, int, int], num_frequencies: int, base: float) -> Tensor:
    """A 3x3 kernel by a ReLU MLP; parameters are weight, bias, weight, bias, ..."""
    values = torch.tensor(encode(*address, num_frequencies, base), dtype=torch.float64)
    pairs = list(zip(parameters[::2], parameters[1::2], strict=True))
    for number, (weight, bias) in enumerate(pairs):
        values = weight @ values + bias
        if number < len(pairs) - 1:
            values = values.clamp(min=0)
    return values.view(3, 3)


def digits_cnn(state: dict[str, Tensor], images: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Logits, and the maps that NeRN compares: every BatchNorm's output and every block's sum, before the ReLU."""
    maps = []

    def norm(x: Tensor, name: str) -> Tensor:
        mean, var, weight, bias = (
            state[f"{name}.{key}"].view(-1, 1, 1) for key in ("running_mean", "running_var", "weight", "bias")
        )
        maps.append((x - mean) / (var + 1e-5).sqrt() * weight + bias)
        return maps[-1]

    x = norm(conv2d((images - 0.3) / 0.38, state["conv1.weight"], padding=1), "bn1").clamp(min=0)
    for stage in (1, 2, 3):
        block, stride = f"layer{stage}.0", 1 if stage == 1 else 2
        inner = norm(conv2d(x, state[f"{block}.conv1.weight"], stride=stride, padding=1), f"{block}.bn1").clamp(min=0)
        outer = norm(conv2d(inner, state[f"{block}.conv2.weight"], padding=1), f"{block}.bn2")
        extra = outer.shape[1] - x.shape[1]
        shortcut = pad(x[:, :, ::stride, ::stride], (0, 0, 0, 0, extra // 2, extra - extra // 2)) if extra else x
        maps.append(outer + shortcut)
        x = maps[-1].clamp(min=0)
    return x.mean((2, 3)) @ state["linear.weight"].T + state["linear.bias"], maps


def step(
    state: dict[str, Tensor],
    addresses: list[tuple[int, int, int]],
    parameters: list[Tensor],
    sampled: set[int],
    images: Tensor,
    weights: tuple[float, float, float],
    num_frequencies: int,
    base: float,
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Loss terms of eq. 1 with NeRN's weights and quirks, and the gradient of their sum."""
    leaves = [p.detach().double().requires_grad_() for p in parameters]
    state = {key: value.double() for key, value in state.items()}
    kernels = []
    for row, address in enumerate(addresses):
        kernel = predict(leaves, address, num_frequencies, base)
        kernels.append(kernel if row in sampled else kernel.detach())
    predicted, start, squares, count = dict(state), 0, torch.zeros((), dtype=torch.float64), 0
    for key, value in state.items():
        if value.ndim == 4:
            rows = value.shape[0] * value.shape[1]
            predicted[key] = torch.stack(kernels[start : start + rows]).view(value.shape)
            start += rows
            squares = squares + ((predicted[key] - value) ** 2).sum()
            count += value.numel()
    student, student_maps = digits_cnn(predicted, images.double())
    teacher, original_maps = digits_cnn(state, images.double())
    features = torch.zeros((), dtype=torch.float64)
    for ours, theirs in zip(student_maps, original_maps, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            unit_one, unit_other = one / ((one**2).sum().sqrt() + 1e-3), other / ((other**2).sum().sqrt() + 1e-3)
            features = features + ((unit_one - unit_other) ** 2).sum() / len(images)
    p, q = teacher.softmax(1), student.softmax(1)
    divergence = (p * ((p + 1e-4).log() - (q + 1e-4).log())).sum() / len(images)
    terms = {
        "recon": weights[0] * (squares / count).sqrt(),
        "features": weights[1] * features,
        "kd": weights[2] * divergence,
    }
    gradients = torch.autograd.grad(torch.stack(list(terms.values())).sum(), leaves)
    return terms, list(gradients)
