from collections.abc import Callable

import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from nernlit.data import DigitsDataModule
from nernlit.errors import UsageError
from nernlit.originals import Original, activation_moments, batch_norm_moments, fisher_information
from nernlit.utilities.processes import Processes
from tests.fakes import STATISTICS, SharingCNN, TinyCNN, tiny_original
from tests.reference import sensitivity as slow

IMAGES = torch.rand(4, 1, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
KEYS = ["stem.weight", "depthwise.weight", "pointwise.weight", "wide.weight", "head.weight"]


class TransposedCNN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(4, 6, 3, groups=2)
        self.norm = nn.BatchNorm2d(6)
        self.line = nn.Conv1d(6, 5, 2)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.line(self.norm(self.up(x)).flatten(2)).mean(2))


class AttentionNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, 4, 2, stride=2)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x).flatten(2).mT
        return self.head(self.attention(tokens, tokens, tokens, need_weights=False)[0].mean(1))


def _trained(net: nn.Module) -> nn.Module:
    """With statistics and factors of BatchNorm layers that differ from 0 and 1."""
    generator = torch.Generator().manual_seed(1)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.running_var, module.weight, module.bias):
                assert tensor is not None
                tensor.data.uniform_(0.5, 2, generator=generator)
    return net


def _tiny() -> Original:
    original = tiny_original()
    _trained(original.net)
    return original.double().freeze()


def _two_layers(images: Tensor | None = None) -> Original:
    """A convolution, BatchNorm with the statistics of these images, and a linear layer."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, momentum=None), nn.Flatten(), nn.Linear(8 * 16, 4))
    if images is not None:
        net((images - 0.5) / 0.5)  # in training mode: estimates the statistics
    return Original.from_module(net.eval(), 4, [0.5] * 3, [0.5] * 3).freeze()


def test_fisher_information_matches_central_differences() -> None:
    original = _tiny()
    found = fisher_information(original, KEYS, IMAGES.split(3), seed=5)
    labels = slow.drawn_labels(original, IMAGES, seed=5)
    assert list(found) == KEYS
    for key in KEYS:
        assert torch.allclose(found[key], slow.fisher(original, key, IMAGES, labels), rtol=1e-4, atol=1e-9), key


def test_a_weight_that_is_used_several_times_has_one_derivative() -> None:
    torch.manual_seed(0)
    original = Original.from_module(SharingCNN(), 10, [0.5] * 3, [0.5] * 3).double().freeze()
    images = torch.rand(2, 3, 5, 5, dtype=torch.float64)
    found = fisher_information(original, ["a.weight"], [images])["a.weight"]
    labels = slow.drawn_labels(original, images, seed=0)
    assert torch.allclose(found, slow.fisher(original, "a.weight", images, labels), rtol=1e-4, atol=1e-9)


def test_fisher_information_depends_on_the_seed_and_not_on_the_batches() -> None:
    original = tiny_original().freeze()
    images = torch.rand(40, 1, 6, 6, generator=torch.Generator().manual_seed(2))
    state = torch.get_rng_state()
    whole = fisher_information(original, KEYS, [images], seed=1)
    parts = fisher_information(original, KEYS, images.split(7), seed=1)
    other = fisher_information(original, KEYS, [images], seed=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(whole[key], parts[key]) for key in KEYS)
    assert not any(torch.equal(whole[key], other[key]) for key in KEYS)


@pytest.mark.parametrize("sensitivity", [fisher_information, activation_moments])
def test_processes_share_the_images(sensitivity: Callable[..., dict[str, torch.Tensor]]) -> None:
    original, images = _tiny(), IMAGES[: len(IMAGES) // 3 * 3]
    whole = sensitivity(original, KEYS, [images])
    # With the sum over processes left out, each has the mean over its own images.
    shares = [sensitivity(original, KEYS, [images[rank::3]], processes=Processes(rank, 3)) for rank in range(3)]
    for key in KEYS:
        assert not torch.allclose(shares[0][key], whole[key])
        assert torch.allclose(torch.stack([share[key] for share in shares]).mean(0), whole[key])


def test_activation_moments_match_loops_over_weights() -> None:
    original = _tiny()
    net = original.net
    assert isinstance(net, TinyCNN)
    found = activation_moments(original, KEYS, IMAGES.split(3))
    normalized = (IMAGES - 0.5) / 0.5
    first = torch.relu(net.norm(net.stem(normalized)))
    second = net.depthwise(first)
    third = torch.relu(net.pointwise(second))
    assert net.norm.running_var is not None
    factors = net.norm.weight / (net.norm.running_var + net.norm.eps).sqrt()
    ones = torch.ones(8, dtype=torch.float64)
    assert torch.allclose(found["stem.weight"], slow.moments(net.stem, factors, normalized))
    assert torch.allclose(found["depthwise.weight"], slow.moments(net.depthwise, ones, first))
    assert torch.allclose(found["pointwise.weight"], slow.moments(net.pointwise, ones, second))
    assert torch.allclose(found["wide.weight"], slow.moments(net.wide, ones, third))
    pooled = net.wide(third).mean((2, 3))
    assert torch.allclose(found["head.weight"], pooled.square().mean(0).expand(10, 4))


def test_activation_moments_of_grouped_transposed_and_one_dimensional_convolutions() -> None:
    torch.manual_seed(0)
    original = Original.from_module(_trained(TransposedCNN()), 3, [0.5] * 4, [0.5] * 4).double().freeze()
    net = original.net
    assert isinstance(net, TransposedCNN)
    images = torch.rand(3, 4, 5, 5, dtype=torch.float64)
    found = activation_moments(original, ["up.weight", "line.weight"], [images])
    normalized = (images - 0.5) / 0.5
    assert net.norm.running_var is not None
    factors = net.norm.weight / (net.norm.running_var + net.norm.eps).sqrt()
    assert torch.allclose(found["up.weight"], slow.moments(net.up, factors, normalized))
    maps = net.norm(net.up(normalized)).flatten(2)
    assert torch.allclose(found["line.weight"], slow.moments(net.line, torch.ones(5), maps))


def test_batch_norm_statistics_tell_the_variance_of_independent_inputs() -> None:
    images = torch.rand(2000, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    original = _two_layers(images)
    net = original.net
    assert isinstance(net, nn.Sequential)
    norm = net[1]
    (found,) = batch_norm_moments(original, ["0.weight"], (6, 6)).values()
    (seen,) = activation_moments(original, ["0.weight"], [images]).values()
    assert torch.allclose(found, seen, rtol=0.05)
    assert norm.running_var is not None
    factor = norm.weight[2] / (norm.running_var[2] + norm.eps).sqrt()
    variance = float(norm.running_var.mean()) / (float(net[0].weight.square().sum()) / 8)
    assert float(found[2, 1, 0, 2]) == pytest.approx(16 * float(factor) ** 2 * variance, rel=1e-5)


def test_every_convolution_of_a_resnet_has_its_batch_norm() -> None:
    original = Original("resnet18", num_classes=10).freeze()
    keys = [key for key, value in original.net.state_dict().items() if value.dim() == 4]
    found = batch_norm_moments(original, keys, (64, 32))
    assert len(found) == 20
    for key, values in found.items():
        assert values.shape == original.net.get_parameter(key).shape
    assert torch.allclose(  # a new network: all variances are 1
        found["layer2.0.downsample.0.weight"],
        8 * 4 * 128 / original.net.get_parameter("layer2.0.downsample.0.weight").square().sum() / (1 + 1e-5),
    )


def test_weights_without_what_is_needed_are_refused_by_name() -> None:
    with pytest.raises(
        UsageError,
        match=r"sensitivity batchnorm: depthwise\.weight, pointwise\.weight, wide\.weight and 1 more are not "
        r"followed by BatchNorm; pass fisher, or leave these layers out \(--model\.representation\.layers\)\.",
    ):
        batch_norm_moments(tiny_original(), KEYS, (6, 6))
    with pytest.raises(
        UsageError,
        match=r"'Sequential' cannot run on images of 2x2 pixels \(.*\); pass their size as sensitivity\.image",
    ):
        batch_norm_moments(_two_layers(), ["0.weight"], (2, 2))
    original = Original.from_module(AttentionNet(), 3, **STATISTICS).freeze()
    keys = ["embed.weight", "attention.in_proj_weight"]
    with pytest.raises(
        UsageError, match=r"sensitivity activation: attention\.in_proj_weight is not used by calling a layer; "
    ):
        activation_moments(original, keys, [torch.rand(2, 1, 4, 4)])
    assert bool(fisher_information(original, keys, [torch.rand(2, 1, 4, 4)])["attention.in_proj_weight"].any())


def test_cheap_estimates_rank_weights_of_the_digits_network_like_the_fisher_information() -> None:
    original = Original("digits_resnet8", pretrained=True).freeze()
    keys = [key for key, value in original.net.state_dict().items() if value.dim() == 4]
    digits = DigitsDataModule()
    digits.setup("fit")
    images = [*digits.training_images(256, seed=0)]
    fisher = fisher_information(original, keys, images)
    assert original.image_size == (8, 8)
    estimates = {
        "activation": activation_moments(original, keys, images),
        "batchnorm": batch_norm_moments(original, keys, original.image_size),
    }
    for name, least in (("activation", 0.45), ("batchnorm", 0.35)):
        pair = [torch.cat([values[key].flatten() for key in keys]) for values in (fisher, estimates[name])]
        assert spearmanr(*pair).statistic > least, name
