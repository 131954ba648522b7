"""BatchNorm without statistics: means and variances in the weights and biases."""

import pytest
import timm
import torch
from torch import nn

from nernlit.originals import without_statistics


def _trained(net: nn.Module) -> nn.Module:
    """With statistics, weights and biases as after a training."""
    generator = torch.Generator().manual_seed(0)
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            size = module.running_mean.shape
            module.running_mean.copy_(0.3 * torch.randn(size, generator=generator))
            module.running_var.copy_(torch.rand(size, generator=generator) + 0.2)
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.2)
    return net.eval()


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("cifar_resnet20", 32),
        ("test_efficientnet", 64),
        ("mobilenetv3_small_050", 64),
        ("regnetx_002", 64),
        ("densenet121", 64),
        ("levit_128s", 224),
        ("resnet18", 64),
    ],
)
def test_outputs_in_evaluation_mode_are_the_same(name: str, size: int) -> None:
    torch.manual_seed(0)
    net = _trained(timm.create_model(name, num_classes=10))
    images = torch.rand(2, 3, size, size)
    with torch.no_grad():
        before = net.double()(images.double())
        changed = without_statistics(net, net.float().state_dict())
        net.load_state_dict({**net.state_dict(), **changed})
        after = net.double()(images.double())
    assert (after - before).abs().max() <= 1e-5 * before.abs().max()
    statistics = {
        key: value for key, value in net.state_dict().items() if key.endswith(("running_mean", "running_var"))
    }
    assert statistics
    for key, value in statistics.items():
        assert (value == float(key.endswith("var"))).all(), key


class _Doubled(nn.BatchNorm2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x) + self.running_mean.sum()  # type: ignore[union-attr]


def test_layers_that_are_not_understood_are_left_alone() -> None:
    shared = nn.BatchNorm1d(3)
    other = nn.BatchNorm1d(3)
    other.weight = shared.weight
    alone = (_Doubled(3), nn.BatchNorm2d(3, affine=False), nn.BatchNorm2d(3, track_running_stats=False), shared, other)
    net = nn.Sequential(*alone)
    assert without_statistics(net, net.state_dict()) == {}
    norm = nn.BatchNorm1d(3)
    assert without_statistics(norm, norm.state_dict()) == {}  # they are 0 and 1 already
    state = _trained(norm).state_dict()
    assert without_statistics(norm, state).keys() == {"weight", "bias", "running_mean", "running_var"}
