import pytest
import timm
import torch
from torch.nn.functional import avg_pool2d

from nernlit.originals import Original
from nernlit.originals.cifar_resnet import ZeroPadShortcut


@pytest.mark.parametrize("depth", [20, 32, 44, 56, 110])
def test_depths_and_parameters_are_those_of_the_residual_network_paper(depth: int) -> None:
    net = timm.create_model(f"cifar_resnet{depth}")
    weighted = [m for m in net.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)]
    assert len(weighted) == depth
    # He et al. 2016, table 6: millions of parameters.
    published = {20: 0.27, 32: 0.46, 44: 0.66, 56: 0.85, 110: 1.73}[depth]
    assert round(sum(p.numel() for p in net.parameters()) / 1e6, 2) == pytest.approx(published, abs=0.011)


def test_shortcut_b_adds_two_convolutions() -> None:
    a, b = timm.create_model("cifar_resnet20"), timm.create_model("cifar_resnet20_b")
    extra = set(b.state_dict()) - set(a.state_dict())
    assert {key for key in extra if key.endswith("0.weight")} == {
        "layer2.0.shortcut.0.weight",
        "layer3.0.shortcut.0.weight",
    }
    assert sum(m.weight.numel() for m in b.modules() if isinstance(m, torch.nn.Conv2d)) == 270_256


def test_shortcut_a_subsamples_and_pads_around() -> None:
    x = torch.arange(32.0).view(1, 2, 4, 4)
    y = ZeroPadShortcut(extra=2, stride=2)(x)
    assert y.shape == (1, 4, 2, 2)
    assert torch.equal(y[:, 1:3], x[:, :, ::2, ::2])
    assert not y[:, [0, 3]].any()
    assert not torch.equal(y[:, 1:3], avg_pool2d(x, 2))


def test_timm_makes_them_for_other_classes_and_channels() -> None:
    net = timm.create_model("cifar_resnet20", num_classes=7, in_chans=1).eval()
    assert net(torch.zeros(2, 1, 32, 32)).shape == (2, 7)
    net.reset_classifier(3)
    assert net(torch.zeros(2, 1, 40, 24)).shape == (2, 3)
    assert net.pretrained_cfg["mean"] == (0.485, 0.456, 0.406)


def test_the_digits_weights_are_in_the_package_and_small() -> None:
    original = Original("digits_resnet8", pretrained=True)
    assert original.in_chans == 1
    assert 4 * sum(v.numel() for v in original.net.state_dict().values()) < 400_000
