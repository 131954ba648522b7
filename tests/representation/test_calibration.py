from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.layers import BatchNormAct2d, LayerNorm2d
from torch import Tensor, nn

from nernlit.errors import DataError, DivergenceError, UsageError
from nernlit.kernels import LayerFilter
from nernlit.originals import Original
from nernlit.predictors import Table
from nernlit.representation import Representation, calibrate
from nernlit.utilities.processes import Processes
from tests.fakes import digits_representation

IMAGES = torch.rand(24, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def _represented(
    net: nn.Module, tune_kept: str = "affine", layers: Any = "all_convs", noise: float = 0.3
) -> Representation:
    """A representation whose weights have errors."""
    torch.manual_seed(1)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean = torch.randn(module.num_features)
            module.running_var = torch.rand(module.num_features) + 0.5
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
        elif isinstance(module, nn.Conv2d | nn.Linear):
            module.reset_parameters()
    original = Original.from_module(net, num_classes=4, mean=[0.5] * 3, std=[0.25] * 3)
    size = max(max(m.kernel_size) for m in net.modules() if isinstance(m, nn.Conv2d)) if layers != "all" else 3
    representation = Representation(original, Table(size), layers, "none", tune_kept=tune_kept)  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in representation.predictor.parameters():
            parameter += noise * torch.randn_like(parameter) * representation.target.std() / representation.scale
    return representation


class Residual(nn.Module):
    """A convolution with a bias, and a block with a sum, a downsampling and a BatchNorm layer with an activation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm0 = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv1, self.norm1 = nn.Conv2d(6, 6, 3, padding=1, bias=False), BatchNormAct2d(6)
        self.conv2, self.norm2 = nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm0(self.stem(x)).relu()
        x = (x + self.norm2(self.conv2(self.norm1(self.conv1(x))))).relu()
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


def _input_of(net: nn.Module, name: str, images: Tensor) -> Tensor:
    seen: list[Tensor] = []
    handle = net.get_submodule(name).register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        net(images)
    handle.remove()
    return seen[0]


@torch.no_grad()
def _slowly_calibrated(representation: Representation, images: Tensor) -> nn.Module:
    """The same layer by layer with numpy's least squares, each time with a new forward pass of both networks."""
    original, net = representation.original.net, representation.module()
    for name in ("stem", "norm0", "norm1", "norm2", "head"):
        module, reference = net.get_submodule(name), original.get_submodule(name)
        x, x0 = _input_of(net, name, images), _input_of(original, name, images)
        if not isinstance(module, nn.BatchNorm2d):
            difference = reference(x0) - module(x)
            module.bias += difference.movedim(1, -1).flatten(0, -2).mean(0)
            continue
        x, x0 = (
            (v - module.running_mean.view(-1, 1, 1)) / (module.running_var + module.eps).sqrt().view(-1, 1, 1)
            for v in (x, x0)
        )  # type: ignore[union-attr]
        for channel in range(6):
            features = torch.stack([x[:, channel].flatten(), torch.ones_like(x[:, channel].flatten())], 1)
            target = x0[:, channel].flatten() * reference.weight[channel] + reference.bias[channel]  # type: ignore[index]
            solution = torch.linalg.lstsq(features.double(), target.double()[:, None]).solution.flatten()
            module.weight[channel], module.bias[channel] = solution[0], solution[1]
    return net


def test_it_equals_a_slow_version_of_it() -> None:
    representation = _represented(Residual())
    expected = _slowly_calibrated(representation, (IMAGES - 0.5) / 0.25)
    calibrate(representation, IMAGES.split(10))
    for key, value in expected.state_dict().items():
        assert torch.allclose(representation.reconstructed()[key], value, rtol=1e-4, atol=1e-5), key


def _distance(representation: Representation) -> float:
    with torch.no_grad():
        return float((representation(IMAGES) - representation.original(IMAGES)).square().mean())


@pytest.mark.parametrize("tune_kept", ["affine", "all"])
def test_the_answers_come_closer_to_the_originals(tune_kept: str) -> None:
    representation = _represented(Residual(), tune_kept)
    before = _distance(representation)
    calibrate(representation, [IMAGES])
    assert _distance(representation) < {"affine": 0.5, "all": 0.2}[tune_kept] * before


@pytest.mark.parametrize("tune_kept", ["affine", "all"])
def test_without_errors_nothing_changes(tune_kept: str) -> None:
    representation = _represented(Residual(), tune_kept, noise=0)
    before = {key: value.clone() for key, value in representation.tuned.named().items()}
    calibrate(representation, [IMAGES])
    for key, value in representation.tuned.named().items():
        assert torch.allclose(value, before[key], atol=1e-4), key


class Scaled(nn.Module):
    """A convolution, a normalization and a linear layer."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3, bias=False), norm, nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x = self.norm(x.movedim(1, -1)).movedim(-1, 1) if type(self.norm) is nn.LayerNorm else self.norm(x)
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("norm", "scale"),
    [
        (lambda: nn.BatchNorm2d(8), torch.linspace(0.2, 3, 8)),
        (lambda: nn.GroupNorm(8, 8), torch.linspace(0.5, 3, 8)),
        (lambda: nn.LayerNorm(8), torch.full((8,), 0.5)),
        (lambda: LayerNorm2d(8), torch.full((8,), 0.5)),
    ],
    ids=["BatchNorm2d", "GroupNorm", "LayerNorm", "LayerNorm2d"],
)
def test_wrong_scales_of_channels_are_undone(norm: Callable[[], nn.Module], scale: Tensor) -> None:
    representation = _represented(Scaled(norm()), noise=0)
    before = representation.reconstructed()["norm.weight"]
    with torch.no_grad():
        for parameter in representation.predictor.parameters():  # the table of the kernels, filter by filter
            parameter *= scale.repeat_interleave(3).view(-1, *[1] * (parameter.dim() - 1))
    assert torch.allclose(
        representation.reconstructed()["conv.weight"],
        representation.original.net.state_dict()["conv.weight"] * scale.view(-1, 1, 1, 1),
    )
    calibrate(representation, [IMAGES])
    assert torch.allclose(representation(IMAGES), representation.original(IMAGES), atol=2e-3)
    if isinstance(representation.original.net.norm, nn.BatchNorm2d):
        assert torch.allclose(representation.reconstructed()["norm.weight"], before / scale, rtol=1e-3)


def test_a_wrong_mean_is_undone_by_a_bias() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 5), nn.Linear(5, 4))
    representation = _represented(net, layers="all", noise=0.5)
    calibrate(representation, [IMAGES])
    own, original = representation(IMAGES), representation.original(IMAGES)
    assert torch.allclose(own.mean(0), original.mean(0), atol=1e-5)
    assert not torch.allclose(own, original, atol=1e-2)


def test_a_kept_linear_layer_takes_over_what_its_inputs_still_show() -> None:
    """Inputs that are a linear map of the original's: its weights can undo the map, up to the ridge."""
    net = nn.Sequential(nn.Conv2d(3, 4, 8, bias=False), nn.Flatten(), nn.Linear(4, 4))
    representation = _represented(net, "all", LayerFilter(["0"]), noise=0)
    with torch.no_grad():
        table = next(representation.predictor.parameters())
        table.copy_(
            (torch.tensor([[1.0, 1, 0, 0], [0, 1, 0, 0], [0, 0, 2, 0], [1, 0, 0, 1]]) @ table.view(4, -1)).view_as(
                table
            )
        )
    before = _distance(representation)
    calibrate(representation, [torch.rand(400, 3, 8, 8), IMAGES])
    assert _distance(representation) < 0.01 * before


def test_a_share_for_each_process_gives_the_same_values() -> None:
    alone = _represented(Residual(), "all")
    calibrate(alone, [IMAGES])
    # The other process has the same images: sums are twice as large.
    shared = _represented(Residual(), "all")
    calibrate(shared, [IMAGES], Processes(0, 2, lambda values: 2 * values))
    for key, value in alone.tuned.named().items():
        assert torch.allclose(value, shared.tuned.named()[key], atol=1e-5), key


def test_only_some_activations_of_large_layers_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    exact, sampled = _represented(Residual()), _represented(Residual())
    calibrate(exact, [IMAGES])
    monkeypatch.setattr("nernlit.representation.calibration._SAMPLED_VALUES", 6 * 500)  # of 6 * 1,536
    calibrate(sampled, [IMAGES])
    for key, value in exact.tuned.named().items():
        if not key.startswith("head"):
            assert not torch.equal(value, sampled.tuned.named()[key]), key
            assert torch.allclose(value, sampled.tuned.named()[key], atol=0.5), key


class Twice(Residual):
    """A convolution that runs twice, with one BatchNorm layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv2, self.norm2 = self.conv1, self.norm1


def test_modules_that_run_twice_keep_their_values() -> None:
    representation = _represented(Twice())
    before = {key: value.clone() for key, value in representation.tuned.named().items()}
    calibrate(representation, [IMAGES])
    changed = {key for key, value in representation.tuned.named().items() if not torch.equal(value, before[key])}
    assert changed == {"stem.bias", "norm0.weight", "norm0.bias", "head.bias"}


def test_a_channel_that_is_constant_keeps_its_scale() -> None:
    representation = _represented(Residual())
    with torch.no_grad():
        representation.original.net.conv1.weight[2] = 0  # type: ignore[index, union-attr]
        representation.target[representation.layout.layers[1].rows][12:18] = 0
        next(representation.predictor.parameters())[representation.layout.layers[1].rows][12:18] = 0
    calibrate(representation, [IMAGES])
    assert all(value.isfinite().all() for value in representation.tuned.values)
    assert torch.equal(representation.tuned.named()["norm1.weight"][2], representation.original.net.norm1.weight[2])  # type: ignore[index, union-attr]


def test_activations_that_are_not_finite_are_refused() -> None:
    representation = _represented(Residual())
    before = {key: value.clone() for key, value in representation.tuned.named().items()}
    with torch.no_grad():
        next(representation.predictor.parameters()).fill_(torch.inf)
    with pytest.raises(DivergenceError, match="calibration: the activations of 'stem' are not finite numbers"):
        calibrate(representation, [IMAGES])
    for key, value in representation.tuned.named().items():
        assert torch.equal(value, before[key])


def test_no_images_are_refused() -> None:
    with pytest.raises(UsageError, match="calibration: there are no images; pass at least one batch"):
        calibrate(_represented(Residual()), [])


def test_a_network_without_such_tensors_is_refused() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 8), nn.Flatten(), nn.PReLU(4))
    net[0].bias = None
    with pytest.raises(UsageError, match="calibration: no kept tensor can be fitted"):
        calibrate(_represented(net), [IMAGES])


def test_linear_layers_of_tokens_keep_their_values() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.mix, self.norm, self.head = (
                nn.Conv2d(3, 8, 4, 4),
                nn.Linear(8, 8),
                nn.LayerNorm(8),
                nn.Linear(8, 4),
            )

        def forward(self, x: Tensor) -> Tensor:
            tokens = self.mix(self.embed(x).flatten(2).movedim(1, 2))
            return self.head(self.norm(tokens)[:, 0])  # type: ignore[no-any-return]

    representation = _represented(Tokens())
    before = {key: value.clone() for key, value in representation.tuned.named().items()}
    calibrate(representation, [IMAGES])
    changed = {key for key, value in representation.tuned.named().items() if not torch.equal(value, before[key])}
    assert changed == {"embed.bias", "norm.weight", "norm.bias", "head.bias"}


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ((255 * torch.rand(4, 1, 8, 8)).byte(), "images are uint8 of shape"),
        (255 * torch.rand(4, 1, 8, 8), r"the pixels of a batch are from .* expected pixels in \[0, 1\]"),
        ((torch.rand(4, 1, 8, 8), torch.zeros(4)), "a batch for calibration is a tuple; expected pixels"),
    ],
)
def test_images_that_are_no_pixels_are_refused(images: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        calibrate(digits_representation(), [images])


class TokensAndVectors(nn.Module):
    """A linear layer that is applied to tokens and to their mean; modules are called by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.mix, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.conv(input=x).relu().flatten(2).transpose(1, 2)
        head: Tensor = self.head(input=self.mix(self.mix(tokens).mean(1)))
        return head


def test_a_layer_of_tokens_and_vectors_is_left_out_and_keywords_are_understood() -> None:
    representation = _represented(TokensAndVectors())
    original = {key: value.clone() for key, value in representation.tuned.named().items()}
    calibrate(representation, [IMAGES])
    changed = {key for key, value in representation.tuned.named().items() if not torch.equal(value, original[key])}
    assert changed == {"conv.bias", "head.bias"}
