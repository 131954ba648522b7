"""CIFAR ResNets (He et al. 2016, arXiv 1512.03385, section 4.2), registered with timm.

Three stages of 16, 32 and 64 channels with n blocks each make 6n + 2 layers. Where the shape changes, shortcut A
subsamples and pads with zero channels (no weights), shortcut B is a 1x1 convolution with BatchNorm. Module names are
those of the public CIFAR checkpoints (`conv1, bn1, layer{1,2,3}.N.{conv1,bn1,conv2,bn2}, linear`), so these load
without renaming.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, final

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.nn import functional

Shortcut = Literal["A", "B"]

#: NeRN and the public CIFAR checkpoints normalize CIFAR images with ImageNet's statistics.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@final
class ZeroPadShortcut(nn.Module):
    """Shortcut A: every `stride`-th pixel, and `extra` channels of zeros, half before and half after the input's."""

    def __init__(self, extra: int, stride: int) -> None:
        super().__init__()
        self.extra, self.stride = extra, stride

    def forward(self, x_BCHW: Tensor) -> Tensor:
        below = self.extra // 2
        return functional.pad(x_BCHW[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, below, self.extra - below))


@final
class BasicBlock(nn.Module):
    """conv-BN-ReLU-conv-BN plus the shortcut, followed by ReLU."""

    def __init__(self, inputs: int, outputs: int, stride: int, shortcut: Shortcut) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.act2 = nn.ReLU(inplace=True)
        self.shortcut: nn.Module = nn.Sequential()
        if stride != 1 or inputs != outputs:
            if shortcut == "A":
                self.shortcut = ZeroPadShortcut(outputs - inputs, stride)
            else:
                self.shortcut = nn.Sequential(
                    nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
                )

    def forward(self, x_BCHW: Tensor) -> Tensor:
        y_BCHW = self.act1(self.bn1(self.conv1(x_BCHW)))
        return self.act2(self.bn2(self.conv2(y_BCHW)) + self.shortcut(x_BCHW))  # type: ignore[no-any-return]


@final
class CifarResNet(nn.Module):
    """A CIFAR ResNet with timm's classifier methods.

    Args:
        blocks: Blocks per stage, n.
        shortcut: `A` or `B`.
        widths: Channels of the three stages.
        num_classes: Number of logits.
        in_chans: Image channels.
    """

    def __init__(
        self,
        blocks: int,
        shortcut: Shortcut = "A",
        widths: Sequence[int] = (16, 32, 64),
        num_classes: int = 10,
        in_chans: int = 3,
    ) -> None:
        super().__init__()
        self.num_classes, self.in_chans = num_classes, in_chans
        self.num_features = widths[-1]
        self.conv1 = nn.Conv2d(in_chans, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.act1 = nn.ReLU(inplace=True)
        self.layer1 = self._stage(blocks, widths[0], widths[0], 1, shortcut)
        self.layer2 = self._stage(blocks, widths[0], widths[1], 2, shortcut)
        self.layer3 = self._stage(blocks, widths[1], widths[2], 2, shortcut)
        self.linear = nn.Linear(widths[-1], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    @staticmethod
    def _stage(blocks: int, inputs: int, outputs: int, stride: int, shortcut: Shortcut) -> nn.Sequential:
        first = BasicBlock(inputs, outputs, stride, shortcut)
        return nn.Sequential(first, *(BasicBlock(outputs, outputs, 1, shortcut) for _ in range(blocks - 1)))

    def get_classifier(self) -> nn.Module:
        return self.linear

    def reset_classifier(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.linear = nn.Linear(self.num_features, num_classes)

    def forward_features(self, x_BCHW: Tensor) -> Tensor:
        x_BCHW = self.act1(self.bn1(self.conv1(x_BCHW)))
        return self.layer3(self.layer2(self.layer1(x_BCHW)))  # type: ignore[no-any-return]

    def forward_head(self, x_BCHW: Tensor, pre_logits: bool = False) -> Tensor:
        pooled_BC = x_BCHW.mean((2, 3))
        return pooled_BC if pre_logits else self.linear(pooled_BC)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x_BCHW))


#: What timm knows of a network for CIFAR.
CIFAR_CONFIG = {
    "num_classes": 10,
    "input_size": (3, 32, 32),
    "mean": IMAGENET_MEAN,
    "std": IMAGENET_STD,
    "first_conv": "conv1",
    "classifier": "linear",
}
_DIGITS = {
    **CIFAR_CONFIG,
    "input_size": (1, 8, 8),
    "mean": (0.3,),
    "std": (0.38,),
    "file": str(Path(__file__).with_name("weights") / "digits_resnet8.safetensors"),
}
_DEPTHS = {20: 3, 32: 5, 44: 7, 56: 9, 110: 18}

default_cfgs = generate_default_cfgs(
    {f"cifar_resnet{depth}{suffix}": CIFAR_CONFIG for depth in _DEPTHS for suffix in ("", "_b")}
    | {"digits_resnet8": _DIGITS}
)


def _register(name: str, blocks: int, shortcut: Shortcut, doc: str, in_chans: int = 3) -> None:
    """Register a model constructor with timm; timm looks its configuration up in `default_cfgs` by name."""

    def create(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
        # timm also passes options that this architecture does not have.
        kwargs = {key: value for key, value in kwargs.items() if key not in ("img_size", "features_only", "drop_rate")}
        options = {"in_chans": in_chans, **kwargs}
        net: CifarResNet = build_model_with_cfg(
            CifarResNet, name, pretrained, blocks=blocks, shortcut=shortcut, **options
        )
        return net

    create.__name__, create.__doc__ = name, doc
    register_model(create)


for _depth, _blocks in _DEPTHS.items():
    _register(f"cifar_resnet{_depth}", _blocks, "A", f"CIFAR ResNet of {_depth} layers with shortcut A.")
    _register(f"cifar_resnet{_depth}_b", _blocks, "B", f"CIFAR ResNet of {_depth} layers with shortcut B (NeRN's).")
_register("digits_resnet8", 1, "A", "8 layers for 8x8 gray digits; `pretrained=True` reads this package's weights.", 1)
