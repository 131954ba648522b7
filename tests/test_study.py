"""The quadratic form of errors that the study of sensitivities compares with."""

import torch
from torch import nn
from torch.nn.functional import conv2d, cross_entropy, pad

from nernlit.originals import Original
from tests.benchmarks.study_errors import fisher_factors, quadratic


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = (
        nn.Conv2d(2, 3, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(3, 4, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    return nn.Sequential(*layers, nn.Linear(4, 5))


def test_factors_are_the_sums_over_images_and_positions() -> None:
    original = Original.from_module(network(), 5, mean=(0.1, 0.2), std=(0.5, 1.0)).freeze()
    pixels_BCHW = torch.rand(6, 2, 5, 5)
    found = fisher_factors(original, ["0.weight"], [pixels_BCHW[:4], pixels_BCHW[4:]], seed=3)

    generator = torch.Generator().manual_seed(3)
    net, outer, inner = original.net, torch.zeros(3, 3).double(), torch.zeros(18, 18).double()
    shares_B5 = original(pixels_BCHW).softmax(1)
    labels = [torch.multinomial(part, 1, generator=generator) for part in shares_B5.split(4)]
    for image_CHW, label in zip((pixels_BCHW - original.mean) / original.std, torch.cat(labels), strict=True):
        output = conv2d(image_CHW[None], net[0].weight, net[0].bias, stride=2, padding=1).requires_grad_()
        gradient = torch.autograd.grad(cross_entropy(net[1:](output), label), output)[0][0].double()
        padded = pad(image_CHW, (1, 1, 1, 1)).double()
        for row in range(3):
            for column in range(3):
                patch = padded[:, 2 * row : 2 * row + 3, 2 * column : 2 * column + 3].flatten()
                inner += torch.outer(patch, patch) / 9
                outer += torch.outer(gradient[:, row, column], gradient[:, row, column])
    torch.testing.assert_close(found["0.weight"], (outer / 6, inner / 6), rtol=1e-5, atol=1e-9)


def test_quadratic_form_is_the_trace_in_units_of_independent_errors() -> None:
    torch.manual_seed(0)
    errors, halves = {"a": torch.randn(3, 2, 2, 2), "b": torch.randn(4, 5)}, {"a": (3, 8), "b": (4, 5)}
    roots = {key: tuple(_symmetric(side) for side in sides) for key, sides in halves.items()}
    traces, total = 0.0, 0.0
    for key, (outer, inner) in roots.items():
        g, a, dw = outer @ outer, inner @ inner, errors[key].flatten(1)
        traces += float(torch.trace(g @ dw @ a @ dw.T))
        total += float(torch.trace(g) * torch.trace(a))
    assert abs(float(quadratic(errors, roots)) - traces / total) < 1e-4 * traces / total


def _symmetric(side: int) -> torch.Tensor:
    matrix = torch.randn(side, side)
    return matrix + matrix.T
