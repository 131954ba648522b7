"""The original: a trained network, by timm name or from memory, with the pixel statistics of its training."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Self, final

import torch
from torch import Tensor, nn
from torch.func import functional_call

from nernlit.coding import NernFile, is_nern, unreadable
from nernlit.errors import DataError, UsageError
from nernlit.originals.checks import pixel_statistics, require_classifier, require_finite_weights, require_plain_weights
from nernlit.originals.timm_models import image_channels, require_counts, require_name, timm_model
from nernlit.storage.container import fingerprint
from nernlit.storage.weights import load_strictly, read_state_dict
from nernlit.utilities.sharing import places_of_weights, with_versions


@final
class Original(nn.Module):
    """A classifier that takes pixels in [0, 1] and normalizes them itself, or (see `from_module`) any network.

    Args:
        name: A timm model name: `cifar_resnet20`, `cifar_resnet56_b`, `resnet18`, ...
        checkpoint: File of weights (.safetensors, .pt, .pth, .th, .ckpt), or a .nern file, whose reconstructed weights
            are loaded; its number of classes, image channels, `mean` and `std` are then the defaults of these options.
        pretrained: Load timm's pretrained weights of this model; most are downloaded.
        num_classes: Number of logits, at least 2; by default the model's own.
        in_chans: Image channels; by default the model's own.
        mean: Pixel mean in [0, 1], a list of one number or of one per channel; by default that of timm's model
            configuration.
        std: Pixel standard deviation; likewise.
        ema: If a checkpoint has two sets of weights, load the moving average (true) or the raw weights (false). By
            default the moving average if there is one, as timm does.
        arguments: Further arguments of the model in timm, for example `{img_size: 32, patch_size: 4, depth: 6}`.

    Raises:
        UsageError: If timm has no model of this name, or options are invalid or contradict each other.
        CheckpointError: If the weights cannot be read or downloaded, do not fit, or are not finite.
        FileFormatError: If a .nern file cannot be decoded.
    """

    mean: Tensor
    std: Tensor
    #: Number of logits; 0 if the network is not an image classifier. `in_chans` is then 0, `mean` and `std` are empty.
    num_classes: int
    #: The options from which the network can be created again; None for a network from memory.
    architecture: dict[str, Any] | None = None
    #: Names of the classes in the order of the logits; empty if they are not known.
    class_names: tuple[str, ...] = ()
    #: For weights decoded from a .nern file: fingerprint of the decoded weights -> fingerprint in the file's header.
    _stated_fingerprints: Mapping[str, str] = MappingProxyType({})

    def __init__(
        self,
        name: str,
        checkpoint: str | None = None,
        pretrained: bool = False,
        num_classes: int | None = None,
        in_chans: int | None = None,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        ema: bool | None = None,
        arguments: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        require_name(name)
        if checkpoint is not None and pretrained:
            raise UsageError(f"both checkpoint={checkpoint!r} and pretrained=true are given; keep one of them.")
        if ema is not None and checkpoint is None:
            raise UsageError(
                f"ema: {str(ema).lower()} chooses among a checkpoint's weights, but no checkpoint is given; leave ema "
                "out."
            )
        file = NernFile.read(checkpoint) if checkpoint is not None and is_nern(checkpoint) else None
        if file is not None:
            if ema is not None:
                raise UsageError(
                    f"ema: {str(ema).lower()} is given, but {checkpoint} holds one set of weights only; leave ema out."
                )
            with unreadable(file.path):
                num_classes = file.header["num_classes"] if num_classes is None else num_classes
                stated = file.header["network"] or {}
                in_chans = stated.get("in_chans") if in_chans is None else in_chans
                if arguments is None and stated.get("name") == name:
                    arguments = stated.get("arguments")
                mean = file.header["mean"] if mean is None else mean
                std = file.header["std"] if std is None else std
        net = timm_model(name, pretrained, num_classes, in_chans, arguments)
        if file is not None and in_chans is None and file.header["in_chans"] not in (None, image_channels(net)):
            in_chans = file.header["in_chans"]
            net = timm_model(name, pretrained, num_classes, in_chans, arguments)
        if checkpoint is not None:
            state = (
                read_state_dict(checkpoint, net, ema)
                if file is None
                else with_versions(file.state_dict(), net.state_dict())
            )
            load_strictly(net, state, checkpoint)
        # A network that a user has registered with timm may state nothing.
        config = getattr(net, "pretrained_cfg", None) or {}
        num_classes = getattr(net, "num_classes", num_classes)
        mean, std = config.get("mean") if mean is None else mean, config.get("std") if std is None else std
        channels = in_chans or (int(config["input_size"][0]) if "input_size" in config else image_channels(net))
        if num_classes is None or channels is None or mean is None or std is None:
            stated = {"num_classes": num_classes, "in_chans": channels, "mean": mean, "std": std}
            missing = " and ".join(key for key, value in stated.items() if value is None)
            raise UsageError(f"{name!r} does not state its {missing}; pass them as options of the original.")
        weights = checkpoint
        if pretrained and num_classes == config.get("num_classes"):  # otherwise timm initializes a random classifier
            weights = "timm's pretrained weights"
        self.architecture = {"name": name, "num_classes": int(num_classes)}
        if in_chans is not None:
            self.architecture["in_chans"] = in_chans
        if arguments:
            self.architecture["arguments"] = arguments
        self._set_up(net, name, weights, int(num_classes), channels, mean, std)
        if file is not None:
            self.set_source(file)

    @classmethod
    def from_module(
        cls,
        net: nn.Module,
        num_classes: int | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        in_chans: int | None = None,
    ) -> Self:
        """An original from a network in memory; its weights are assumed to be trained.

        Without `num_classes`, `mean` and `std` any network is accepted. It is then never run; its weights can be fitted
        by Recon-only or Progressive, analyzed and stored.

        Args:
            net: Maps normalized images (B, C, H, W) to logits (B, num_classes). Its weights are float32.
            num_classes: Number of logits, at least 2; None if the network is no image classifier.
            mean: Pixel mean, one number or one per channel, in [0, 1]; None likewise.
            std: Pixel standard deviation; likewise.
            in_chans: Image channels. By default the network's `in_chans` or timm's `pretrained_cfg`, else the input
                channels of its first convolution.

        Raises:
            UsageError: If the weights are not plain float32 parameters, or an argument is invalid.
            CheckpointError: If a weight is not finite.
        """
        name = type(net).__name__
        require_counts(name, num_classes, in_chans)
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        if num_classes is not None and mean is not None and std is not None:
            self._set_up(net, name, "memory", num_classes, in_chans or image_channels(net) or len(mean), mean, std)
        elif num_classes is None and mean is None and std is None and in_chans is None:
            self._set_up(net, name, "memory", 0, 0, (), ())
        else:
            raise UsageError(
                f"num_classes={num_classes}, mean={mean}, std={std}, in_chans={in_chans} for {name!r}; an image "
                "classifier needs num_classes, mean and std; for any other network, pass none of the four."
            )
        return self

    def _set_up(
        self,
        net: nn.Module,
        name: str,
        weights: str | None,
        num_classes: int,
        channels: int,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        require_plain_weights(net, name)
        require_finite_weights(net, weights if weights not in (None, "memory") else repr(name))
        none = torch.empty(0, 1, 1)
        mean_C11, std_C11 = pixel_statistics(mean, std, channels, name) if num_classes else (none, none.clone())
        device = next((parameter.device for parameter in net.parameters()), mean_C11.device)
        self.net = net
        self.places = places_of_weights(net)
        self._frozen = False
        self.name = name
        self.weights_from = weights
        self.num_classes = num_classes
        self.in_chans = channels
        self.register_buffer("mean", mean_C11.to(device), persistent=False)
        self.register_buffer("std", std_C11.to(device), persistent=False)

    def forward(self, images_BCHW: Tensor, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """Logits (B, num_classes) of pixels in [0, 1].

        Args:
            images_BCHW: Pixels.
            weights: State-dict key -> weight, to be used in this call instead of the network's own. A weight with
                several names is replaced under all of them; pass it under one.

        Raises:
            DataError: If the images are integers, or have more precision than the network, which would fail.
            UsageError: If the network is no image classifier, or does not return logits of this shape.
        """
        require_classifier("a forward pass", self.name, self.num_classes)
        if not images_BCHW.is_floating_point():
            kind = str(images_BCHW.dtype).removeprefix("torch.")
            raise DataError(f"the images are {kind}; expected pixels in [0, 1], so divide bytes by 255.")
        if self._frozen and self.net.training:
            self.net.eval()  # a network from memory is also the caller's, who may have called `train`
        pixels_BCHW = (images_BCHW - self.mean) / self.std
        if pixels_BCHW.dtype != self.mean.dtype:
            given, own = (str(value.dtype).removeprefix("torch.") for value in (images_BCHW, self.mean))
            raise DataError(f"the images are {given}, but {self.name!r} is {own}; convert the images.")
        entries = {place: value for key, value in (weights or {}).items() for place in self.places[key]}
        logits_BC = (
            functional_call(self.net, entries, (pixels_BCHW,), tie_weights=False) if entries else self.net(pixels_BCHW)
        )
        expected = (len(images_BCHW), self.num_classes)
        if not isinstance(logits_BC, Tensor) or logits_BC.shape != expected:
            given = (
                f"tensor of shape {tuple(logits_BC.shape)}"
                if isinstance(logits_BC, Tensor)
                else type(logits_BC).__name__
            )
            raise UsageError(
                f"{self.name!r} returned a {given}; expected logits of shape {expected}. "
                "Pass the right num_classes, or wrap the network in a module that returns its logits alone."
            )
        return logits_BC

    def freeze(self) -> Self:
        """Disable gradients and stay in evaluation mode even after `train()`, so BatchNorm statistics never change.

        Raises:
            CheckpointError: If a weight is not finite.
        """
        require_finite_weights(self.net, repr(self.name))
        self._frozen = True
        return self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Self:
        """Set training mode, unless the original is frozen."""
        return super().train(mode and not self._frozen)

    def require_weights(self, role: str = "original") -> None:
        """Check that the network has trained weights.

        Raises:
            UsageError: If neither a checkpoint nor pretrained weights were given.
        """
        if self.weights_from is None:
            flag = {"original": "representation.original", "teacher": "teacher"}[role]
            raise UsageError(
                f"the {role} {self.name!r} has random weights; pass --model.{flag}.checkpoint FILE "
                "(or pretrained: true, if timm has pretrained weights with this number of classes). "
                "`lightning fit` with an OriginalModule config trains one."
            )

    @property
    def image_size(self) -> tuple[int, int] | None:
        """Height and width in pixels of the network's images, from its `arguments` or as timm states them, or None."""
        size = ((self.architecture or {}).get("arguments") or {}).get("img_size")
        if size is not None:
            height, width = size if isinstance(size, list | tuple) else (size, size)
            return int(height), int(width)
        stated = (getattr(self.net, "pretrained_cfg", None) or {}).get("input_size")
        return None if stated is None else (int(stated[1]), int(stated[2]))

    def fingerprint(self) -> str:
        """SHA-256 of the weights' names, shapes and values; equal for two originals with the same weights only.

        For weights decoded from a .nern file it is the one stated in the file, because their last bits depend on the
        machine that decodes them.
        """
        own = fingerprint(self.net.state_dict())
        return self._stated_fingerprints.get(own, own)

    def set_source(self, file: NernFile) -> None:
        """Record that the current weights were decoded from a .nern file, and take over its class names."""
        self.weights_from = str(file.path)
        self.class_names = tuple(str(name) for name in file.header["class_names"])
        self._stated_fingerprints = {fingerprint(self.net.state_dict()): file.checks.reconstructed}
