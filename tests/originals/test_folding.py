from collections.abc import Iterable

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


def _assert_equal_gradients(got: Tensor, expected: Tensor, weights: Iterable[Tensor]) -> None:
    inputs = list(weights)
    gradients = (torch.autograd.grad(logits.square().sum(), inputs) for logits in (got, expected))
    for left, right in zip(*gradients, strict=True):
        assert torch.allclose(left, right, rtol=1e-6, atol=1e-9 * float(right.abs().max()))


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
    _assert_equal_gradients(got, expected, weights.values())


@pytest.mark.parametrize(("name", "side"), [("cifar_resnet20_b", 32), ("mobilenetv2_050", 64)])
@pytest.mark.parametrize("replaced", ["all", "biases"])
def test_weights_and_biases_of_folded_norms_can_be_replaced(name: str, side: int, replaced: str) -> None:
    original, images = _trained(name, side)
    folded = Folded(original, images)
    entries = {
        key: torch.randn_like(value).mul(0.1).requires_grad_()
        for key, value in original.net.named_parameters()
        if value.dim() == 1 and (replaced == "all" or key.endswith("bias"))
    }
    expected, got = original(images, entries), folded(images, entries)
    assert torch.allclose(got, expected, rtol=1e-9)
    _assert_equal_gradients(got, expected, entries.values())


@pytest.mark.parametrize("affine", [True, False])
def test_biases_of_folded_convolutions_can_be_replaced(affine: bool) -> None:
    torch.manual_seed(0)
    norms = [nn.BatchNorm2d(6, affine=affine) for _ in range(2)]
    for norm in norms:
        assert norm.running_mean is not None
        assert norm.running_var is not None
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    convs = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3)
    layers = convs[0], norms[0], nn.ReLU(), convs[1], norms[1], nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)
    original = Original.from_module(nn.Sequential(*layers).eval(), 4, (0.5,) * 3, (0.2,) * 3).freeze().double()
    images = torch.rand(2, 3, 12, 12, dtype=torch.float64)
    folded = Folded(original, images)
    assert _norms(folded.net) == 0
    for keys in (["0.bias"], ["0.bias", "3.bias", "0.weight"], [key for key, _ in original.net.named_parameters()]):
        state = original.net.state_dict()
        entries = {key: torch.randn_like(state[key]).requires_grad_() for key in keys}
        expected, got = original(images, entries), folded(images, entries)
        assert torch.allclose(got, expected, rtol=1e-9)
        _assert_equal_gradients(got, expected, entries.values())


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


@pytest.mark.parametrize(
    ("name", "side"),
    [("digits_resnet8", 8), ("cifar_resnet56_b", 32), ("resnet18", 64), ("resnet50", 64), ("vgg11_bn", 32)],
)
def test_every_pair_of_the_networks_that_fits_use_is_folded(name: str, side: int) -> None:
    original = Original.from_module(timm.create_model(name, num_classes=10), 10, [0.5], [0.5]).freeze()
    assert _norms(original.net) > 0
    assert _norms(Folded(original, torch.rand(2, original.in_chans, side, side)).net) == 0


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_what_is_folded_does_not_depend_on_values(scale: float) -> None:
    original = Original("digits_resnet8").freeze()
    for parameter in original.net.parameters():
        parameter.mul_(scale)
    for images in (torch.rand(2, 1, 8, 8), torch.full((2, 1, 8, 8), float("nan"))):
        assert _norms(Folded(original, images).net) == 0


class _Net(nn.Module):
    """A convolution and a BatchNorm layer; what else reads the convolution's output is for subclasses to say."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3)
        self.bn = nn.BatchNorm2d(5)

    def forward(self, images: Tensor) -> Tensor:
        return self.after(self.conv(images)).mean((2, 3))

    def after(self, maps: Tensor) -> Tensor:
        return self.bn(maps)


class _Plain(_Net):
    pass


class _Dropout(_Net):
    def after(self, maps: Tensor) -> Tensor:
        return self.bn(nn.functional.dropout(maps, training=self.training))


class _BatchOfShape(_Net):
    def after(self, maps: Tensor) -> Tensor:
        assert self.bn.weight.shape[0] == maps.shape[1]
        return self.bn(maps)


class _Sum(_Net):
    def after(self, maps: Tensor) -> Tensor:
        return maps + self.bn(maps)


class _SilentTap(_Net):
    """A tap that gives zeros at the first weights, and not once they have moved."""

    def after(self, maps: Tensor) -> Tensor:
        return self.bn(maps) + (maps.clamp(min=3) - 3)


class _View(_Net):
    def after(self, maps: Tensor) -> Tensor:
        rows = maps[:, :, 0]
        return self.bn(maps) + rows[:, :, None]


class _Flattened(_Net):
    def after(self, maps: Tensor) -> Tensor:
        return self.bn(maps.flatten(2).unflatten(2, maps.shape[2:]))


class _InPlaceBefore(_Net):
    def after(self, maps: Tensor) -> Tensor:
        return self.bn(maps.add_(1))


class _InPlaceAfter(_Net):
    def after(self, maps: Tensor) -> Tensor:
        normed = self.bn(maps)
        return normed + maps.relu_()


class _Data(_Net):
    def after(self, maps: Tensor) -> Tensor:
        return self.bn(maps) + maps.data


class _Script(_Net):
    def after(self, maps: Tensor) -> Tensor:
        return self.bn(maps) + _scripted(maps)


@torch.jit.script
def _scripted(maps: Tensor) -> Tensor:
    return maps.clamp(min=3)


class _Decides(_Net):
    def after(self, maps: Tensor) -> Tensor:
        normed = self.bn(maps)
        return normed + maps.relu() if normed.max() > 100 else normed


class _ConvTwice(_Net):
    def forward(self, images: Tensor) -> Tensor:
        return self.bn(self.conv(images)).mean((2, 3)) + self.conv(images.flip(3)).mean((2, 3))


class _NormTwice(_Net):
    def after(self, maps: Tensor) -> Tensor:
        return self.bn(self.bn(maps))


class _WeightRead(_Net):
    def after(self, maps: Tensor) -> Tensor:
        return self.bn(maps) + self.conv.weight.abs().mean()


class _FunctionalConv(_Net):
    def forward(self, images: Tensor) -> Tensor:
        again = nn.functional.conv2d(images, self.conv.weight)
        return (self.bn(self.conv(images)) + again).mean((2, 3))


class _StatisticsRead(_Net):
    def after(self, maps: Tensor) -> Tensor:
        return self.bn(maps) * self.bn.running_var[:, None, None]


class _KindRead(_Net):
    def after(self, maps: Tensor) -> Tensor:
        normed = self.bn(maps)
        return normed.relu() if isinstance(self.bn, nn.BatchNorm2d) else normed


class _Aliased(_Net):
    def __init__(self) -> None:
        super().__init__()
        self.norm = self.bn

    def after(self, maps: Tensor) -> Tensor:
        return self.norm(maps)


class _AliasedConv(_Net):
    def __init__(self) -> None:
        super().__init__()
        self.stem = self.conv


class _Keyword(_Net):
    def after(self, maps: Tensor) -> Tensor:
        return self.bn(input=maps)


class _Kept(_Net):
    """A tap by way of an attribute."""

    def after(self, maps: Tensor) -> Tensor:
        self.kept = maps
        return self.bn(maps) + self.kept.clamp(min=3)


class _Hooked(_Net):
    def __init__(self, layer: str, before: bool = False) -> None:
        super().__init__()
        module = self.get_submodule(layer)
        if before:
            module.register_forward_pre_hook(lambda _m, args: (args[0] * 2,))
        else:
            module.register_forward_hook(lambda _m, args, output: output + 1)


class _TrainingNorm(_Net):
    def train(self, mode: bool = True) -> "_TrainingNorm":
        super().train(mode)
        self.bn.train()
        return self


class _Lazy(nn.BatchNorm2d):
    """A subclass that does more."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).relu()


class _Subclass(_Net):
    def __init__(self) -> None:
        super().__init__()
        self.bn = _Lazy(5)


def _check(net: nn.Module, norms: int) -> None:
    """The folded network has so many BatchNorm layers, and answers as the network does, whatever the weights."""
    torch.manual_seed(0)
    norm = net.get_submodule("bn")
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.running_mean.fill_(0.3)
    norm.running_var.fill_(0.5)
    original = Original.from_module(net, 5, [0.5], [0.5]).freeze()
    images = torch.rand(2, 3, 8, 8)
    fingerprint = original.fingerprint()
    folded = Folded(original, images)
    assert _norms(folded.net) == norms
    for weights in ({}, {"conv.weight": 30 * torch.randn(5, 3, 3, 3)}):
        state = {key: value.clone() for key, value in original.net.state_dict().items()}
        got = folded(images, weights)
        expected = original(images, weights)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        original.net.load_state_dict(state)  # a norm in training mode has moved its statistics
    assert original.fingerprint() == fingerprint or isinstance(net, _TrainingNorm)


@pytest.mark.parametrize("net", [_Plain(), _Dropout()], ids=lambda net: type(net).__name__)
def test_what_can_be_proven_is_folded(net: nn.Module) -> None:
    _check(net, norms=0)


NOT_FOLDED = [_Sum, _SilentTap, _View, _Flattened, _InPlaceBefore, _InPlaceAfter, _Data, _Script, _Decides, _ConvTwice]
NOT_FOLDED += [_NormTwice, _WeightRead, _FunctionalConv, _StatisticsRead, _KindRead, _BatchOfShape, _Aliased]
NOT_FOLDED += [_AliasedConv, _Keyword, _Kept, _Subclass, _TrainingNorm]


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.parametrize("kind", NOT_FOLDED, ids=lambda kind: kind.__name__)
def test_what_cannot_be_proven_is_left_alone(kind: type[nn.Module]) -> None:
    _check(kind(), norms=1)


@pytest.mark.parametrize(("layer", "before"), [("conv", False), ("conv", True), ("bn", False), ("bn", True)])
def test_layers_with_hooks_are_left_alone(layer: str, before: bool) -> None:
    _check(_Hooked(layer, before), norms=1)


def test_one_tap_leaves_the_other_layers_folded() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = _SilentTap(), _Plain()

        def forward(self, images: Tensor) -> Tensor:
            return self.first(images) + self.second(images)

    original = Original.from_module(Two(), 5, [0.5], [0.5]).freeze()
    folded = Folded(original, torch.rand(2, 3, 8, 8))
    assert isinstance(folded.net.get_submodule("first.bn"), nn.BatchNorm2d)
    assert isinstance(folded.net.get_submodule("second.bn"), nn.Identity)


def test_shared_tensors_of_batch_norm_are_left_alone() -> None:
    """An entry for a shared tensor changes all layers that have it, so folding it into one of them would be wrong."""
    torch.manual_seed(0)
    net = nn.Sequential(
        *(
            nn.Conv2d(3, 3, 3, padding=1),
            nn.BatchNorm2d(3),
            nn.ReLU(),
            nn.Conv2d(3, 3, 3, padding=1),
            nn.BatchNorm2d(3),
        ),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 10)),
    ).eval()
    net[4].weight, net[4].bias, net[3].bias = net[1].weight, net[1].bias, net[0].bias
    original = Original.from_module(net, 10, (0.5,) * 3, (0.5,) * 3).freeze()
    images = torch.rand(2, 3, 8, 8)
    weights = {key: torch.randn(3) for key in ("0.bias", "1.weight", "1.bias")}
    assert torch.allclose(Folded(original, images)(images, weights), original(images, weights), atol=1e-5)


def test_it_can_be_made_where_autograd_and_precision_are_off() -> None:
    original = Original.from_module(timm.create_model("digits_resnet8"), 10, [0.3], [0.4]).freeze()
    images = torch.rand(2, 1, 8, 8)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        folded = Folded(original, images)
    weights = {"conv1.weight": torch.randn_like(original.net.state_dict()["conv1.weight"]).requires_grad_()}
    folded(images, weights).sum().backward()
    assert weights["conv1.weight"].grad is not None
    assert torch.allclose(folded(images), original(images), atol=1e-5)
