import pytest
import timm
import torch
from torch import Tensor, nn

from nernlit.originals import NERN_TAPS, FeatureTaps, Folded, Original


def _trained(name: str, side: int) -> tuple[Original, Tensor]:
    """A classifier whose BatchNorm layers have statistics of their own, and images."""
    torch.manual_seed(0)
    original = Original(name).double()
    for module in original.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return original.freeze(), torch.rand(2, original.in_chans, side, side, dtype=torch.float64)


def _norms(net: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in net.modules())


@pytest.mark.parametrize(("name", "side"), [("cifar_resnet20_b", 32), ("resnet18", 64), ("mobilenetv2_050", 64)])
def test_answers_and_gradients_are_the_classifiers(name: str, side: int) -> None:
    original, images = _trained(name, side)
    folded = Folded(original, images)
    assert torch.allclose(folded(images), original(images), rtol=1e-9)
    weights = {
        f"{name}.weight": torch.randn_like(module.weight).mul(0.1).requires_grad_()
        for name, module in original.net.named_modules()
        if isinstance(module, nn.Conv2d)
    }
    entries = {f"net.{key}": value for key, value in weights.items()}
    expected = torch.func.functional_call(original, entries, (images,))
    got = folded(images, weights)
    assert torch.allclose(got, expected, rtol=1e-9)
    for left, right in zip(
        torch.autograd.grad(got.square().sum(), list(weights.values())),
        torch.autograd.grad(expected.square().sum(), list(weights.values())),
        strict=True,
    ):
        assert torch.allclose(left, right, rtol=1e-6, atol=1e-9 * float(right.abs().max()))


def test_every_norm_of_a_resnet_goes_and_the_classifier_stays() -> None:
    original, images = _trained("cifar_resnet20", 32)
    before = original.fingerprint()
    assert _norms(Folded(original, images).net) == 0
    assert _norms(original.net) == 19
    assert original.fingerprint() == before


def test_taps_read_what_they_read_in_the_classifier() -> None:
    original, images = _trained("cifar_resnet20", 32)
    patterns = (*NERN_TAPS, "layer1.0.conv1", "layer2.*.bn1:input")
    tapped = FeatureTaps(original.net, patterns)
    folded = Folded(original, images, tapped.taps)
    assert _norms(folded.net) == 1 + 3
    with tapped.collect() as expected:
        original(images)
    with FeatureTaps(folded.net, patterns).collect() as got:
        folded(images)
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.allclose(got[name], value, rtol=1e-9, atol=1e-9), name


class _Twice(nn.Module):
    """A convolution that a BatchNorm layer and a sum read."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3)
        self.bn = nn.BatchNorm2d(5)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.conv(images)
        return (maps + self.bn(maps)).mean((2, 3))


class _Shared(_Twice):
    """A convolution that runs twice, with one BatchNorm layer behind it once."""

    def forward(self, images: Tensor) -> Tensor:
        return self.bn(self.conv(images)).mean((2, 3)) + self.conv(images.flip(3)).mean((2, 3))


@pytest.mark.parametrize("net", [_Twice(), _Shared()])
def test_what_cannot_be_folded_is_left_alone(net: nn.Module) -> None:
    original = Original.of(net, 5, [0.5], [0.5]).freeze()
    assert isinstance(net.bn, nn.BatchNorm2d)
    assert net.bn.running_mean is not None
    net.bn.running_mean.fill_(3.0)
    images = torch.rand(2, 3, 8, 8)
    folded = Folded(original, images)
    assert torch.equal(folded(images), original(images))
    assert _norms(folded.net) == 1


def test_it_can_be_made_where_autograd_and_precision_are_off() -> None:
    original = Original.of(timm.create_model("digits_resnet8"), 10, [0.3], [0.4]).freeze()
    images = torch.rand(2, 1, 8, 8)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        folded = Folded(original, images)
    weights = {"conv1.weight": torch.randn_like(original.net.state_dict()["conv1.weight"]).requires_grad_()}
    folded(images, weights).sum().backward()
    assert weights["conv1.weight"].grad is not None
    assert torch.allclose(folded(images), original(images), atol=1e-5)
