"""ImageNet's ResNets (arXiv 1512.03385, table 1) with the usual stem for images of 32 pixels, registered with timm.

The first convolution is 3x3 with stride 1, and there is no max-pooling. All other modules, their names and their shapes
are those of timm's and torchvision's ResNets. `cifar_stem_resnet50` for 100 classes has 23,705,252 parameters, the
90.43 MB of the paper's teacher (arXiv 2407.00356, section 4.3).
"""

from collections.abc import Sequence
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import nn

from nernlit.originals.cifar_resnet import CIFAR_CONFIG

_CONFIG = {**CIFAR_CONFIG, "classifier": "fc"}
default_cfgs = generate_default_cfgs({f"cifar_stem_resnet{depth}": _CONFIG for depth in (18, 34, 50)})


def with_cifar_stem(in_chans: int = 3, **kwargs: Any) -> nn.Module:
    """A timm ResNet with a 3x3 stem and without max-pooling.

    Args:
        in_chans: Image channels.
        kwargs: Arguments of `timm.models.resnet.ResNet`.
    """
    net: nn.Module = ResNet(in_chans=in_chans, **kwargs)
    stem = nn.Conv2d(in_chans, 64, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")  # as in timm's
    net.conv1, net.maxpool = stem, nn.Identity()
    return net


def _register(depth: int, block: type[nn.Module], layers: Sequence[int]) -> None:
    """Register a model constructor with timm; timm looks its configuration up in `default_cfgs` by name."""
    name = f"cifar_stem_resnet{depth}"

    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        options = {"block": block, "layers": layers, **kwargs}
        net: nn.Module = build_model_with_cfg(with_cifar_stem, name, pretrained, **options)
        return net

    create.__name__, create.__doc__ = name, f"ResNet{depth} with the stem for images of 32 pixels."
    register_model(create)


_register(18, BasicBlock, (2, 2, 2, 2))
_register(34, BasicBlock, (3, 4, 6, 3))
_register(50, Bottleneck, (3, 4, 6, 3))
