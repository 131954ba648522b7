import pytest
import timm
import torch
from torch.nn.functional import batch_norm, conv2d

from nernlit.errors import UsageError
from nernlit.originals import FeatureTaps, Original


@pytest.mark.parametrize(("name", "blocks"), [("cifar_resnet20", 9), ("cifar_resnet20_b", 9), ("resnet18", 8)])
def test_the_default_taps_are_every_norm_and_every_sum(name: str, blocks: int) -> None:
    taps = FeatureTaps(timm.create_model(name)).taps
    norms = [tap for tap in taps if ":" not in tap]
    sums = [tap for tap in taps if tap.endswith(":input")]
    assert len(norms) == 1 + 2 * blocks
    assert len(sums) == blocks


def test_maps_are_those_before_the_relu() -> None:
    net = Original("digits_resnet8", pretrained=True).net.eval()
    state = net.state_dict()
    images = torch.randn(3, 1, 8, 8)
    with FeatureTaps(net).collect() as maps, torch.no_grad():
        net(images)

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        keys = ("running_mean", "running_var", "weight", "bias")
        return batch_norm(x, *(state[f"{name}.{key}"] for key in keys))

    stem = norm(conv2d(images, state["conv1.weight"], padding=1), "bn1")
    inner = norm(conv2d(stem.relu(), state["layer1.0.conv1.weight"], padding=1), "layer1.0.bn1")
    outer = norm(conv2d(inner.relu(), state["layer1.0.conv2.weight"], padding=1), "layer1.0.bn2")
    expected = {"bn1": stem, "layer1.0.bn1": inner, "layer1.0.bn2": outer}
    expected["layer1.0.act2:input"] = outer + stem.relu()
    for tap, value in expected.items():
        assert torch.allclose(maps[tap], value, atol=1e-5), tap
        assert (maps[tap] < 0).any(), f"{tap} was changed by the ReLU behind it"


def test_nothing_is_left_behind() -> None:
    net = timm.create_model("cifar_resnet20")
    with FeatureTaps(net).collect() as maps:
        pass
    net(torch.randn(1, 3, 32, 32))
    assert maps == {}


def test_patterns_that_match_nothing_are_refused() -> None:
    with pytest.raises(UsageError, match=r"the tap 'norm\*' matches no module of CifarResNet \(first: conv1, bn1"):
        FeatureTaps(timm.create_model("cifar_resnet20"), ["norm*"])
