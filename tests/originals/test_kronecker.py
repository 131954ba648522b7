import pytest
import torch
from torch import nn
from torch.nn.functional import conv2d, cross_entropy, pad

from nernlit.errors import UsageError
from nernlit.originals import Original, kronecker_factors
from nernlit.originals.sensitivity import drawn_label
from nernlit.utilities.processes import Processes
from tests.fakes import tiny_original


def _original() -> Original:
    torch.manual_seed(0)
    layers = nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(3, 4, 1)
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    return Original.from_module(net, 5, mean=(0.1, 0.2), std=(0.5, 1.0)).freeze()


def test_factors_are_sums_over_images_and_positions() -> None:
    original, pixels_BCHW = _original(), torch.rand(6, 2, 5, 5)
    found = kronecker_factors(original, ["0.weight"], [pixels_BCHW[:4], pixels_BCHW[4:]], seed=3)["0.weight"]
    generator, net = torch.Generator().manual_seed(3), original.net
    outputs, inputs = torch.zeros(3, 3).double(), torch.zeros(18, 18).double()
    for image_CHW in (pixels_BCHW - original.mean) / original.std:
        output = conv2d(image_CHW[None], net[0].weight, net[0].bias, stride=2, padding=1).requires_grad_()
        logits = net[1:](output)
        label = drawn_label(logits.detach(), torch.rand(1, generator=generator, dtype=torch.float64)[0])
        gradient = torch.autograd.grad(cross_entropy(logits, label), output)[0][0].double()
        padded = pad(image_CHW, (1, 1, 1, 1)).double()
        for row in range(3):
            for column in range(3):
                patch = padded[:, 2 * row : 2 * row + 3, 2 * column : 2 * column + 3].flatten()
                inputs += torch.outer(patch, patch) / 9
                outputs += torch.outer(gradient[:, row, column], gradient[:, row, column])
    torch.testing.assert_close(tuple(found), (outputs / 6, inputs / 6), rtol=1e-5, atol=1e-9)


def test_batches_and_processes_do_not_change_the_factors() -> None:
    original, pixels_BCHW = _original(), torch.rand(6, 2, 5, 5)
    keys = ["0.weight", "2.weight"]
    alone = kronecker_factors(original, keys, [pixels_BCHW])
    by_image = kronecker_factors(original, keys, pixels_BCHW.split(1))
    torch.testing.assert_close(alone, by_image, rtol=1e-5, atol=1e-12)
    # Each process has every second image, and the sum of both is what each of them gets.
    parts = []
    for rank in range(2):
        processes = Processes(rank, 2, lambda value: value)
        own = kronecker_factors(original, keys, [pixels_BCHW[rank::2]], processes=processes)
        parts.append({key: factors.inputs for key, factors in own.items()})
    for key, factors in alone.items():
        torch.testing.assert_close((parts[0][key] + parts[1][key]) / 2, factors.inputs, rtol=1e-5, atol=1e-12)


def test_other_layers_are_refused_by_name() -> None:
    original = tiny_original()
    with pytest.raises(UsageError, match=r"ungrouped Conv2d layers .*, and depthwise.weight .*; pass fisher"):
        kronecker_factors(original, ["stem.weight", "depthwise.weight"], [torch.rand(2, 1, 8, 8)])
    with pytest.raises(UsageError, match=r"head.weight is of others"):
        kronecker_factors(original, ["head.weight"], [torch.rand(2, 1, 8, 8)])


@pytest.mark.parametrize("times", [1, 2])
def test_an_activation_in_place_and_a_layer_that_runs_twice(times: int) -> None:
    class Net(nn.Module):
        def __init__(self, inplace: bool) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.conv, self.act, self.head = nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(inplace), nn.Linear(3, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.head(sum(self.act(self.conv(x)) for _ in range(times)).mean((2, 3)))
            return logits

    pixels_BCHW = torch.rand(5, 3, 6, 6)
    one, other = (
        kronecker_factors(
            Original.from_module(Net(inplace), 4, [0.5] * 3, [0.5] * 3).freeze(), ["conv.weight"], [pixels_BCHW]
        )["conv.weight"]
        for inplace in (False, True)
    )
    torch.testing.assert_close(one, other)
    patches = torch.nn.functional.unfold((pixels_BCHW - 0.5) / 0.5, 3, padding=1).movedim(1, 0).flatten(1).double()
    torch.testing.assert_close(one.inputs, patches @ patches.T / patches.shape[1], rtol=1e-5, atol=1e-9)
