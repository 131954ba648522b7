"""An original: a CNN by its timm name, its weights, and the pixel statistics it was trained with."""

import difflib
import hashlib
from collections.abc import Mapping, Sequence
from typing import Self, final

import timm
import torch
from torch import Tensor, nn
from torch.func import functional_call

from nernlit.errors import CheckpointError, UsageError
from nernlit.originals import cifar_resnet  # noqa: F401 - registers our networks with timm
from nernlit.originals.checkpoint import load_strictly, read_state_dict
from nernlit.sharing import places_of_weights


@final
class Original(nn.Module):
    """A classifier of pixels in [0, 1]; it normalises them itself.

    Args:
        name: A timm model name: `cifar_resnet20`, `cifar_resnet56_b`, `resnet18`, ...
        checkpoint: File of weights (.safetensors, .pt, .pth, .th, .ckpt).
        pretrained: Load the weights that timm knows for this name; most are downloaded.
        num_classes: Logits, by default the model's own.
        in_chans: Image channels, by default the model's own.
        mean: A number a channel in [0, 1] pixel units, by default what timm says the model was trained with.
        std: Likewise.

    Raises:
        UsageError: If timm does not know the name, or both kinds of weights are asked for.
        CheckpointError: If the weights cannot be read, downloaded, or do not fit.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        name: str,
        checkpoint: str | None = None,
        pretrained: bool = False,
        num_classes: int | None = None,
        in_chans: int | None = None,
        mean: list[float] | None = None,
        std: list[float] | None = None,
    ) -> None:
        super().__init__()
        if not timm.is_model(name):
            close = difflib.get_close_matches(name, timm.list_models(), 3) or ["cifar_resnet20", "resnet18"]
            raise UsageError(f"timm has no model named {name!r}; did you mean {', '.join(close)}?")
        if checkpoint and pretrained:
            raise UsageError(f"both checkpoint={checkpoint!r} and pretrained=true are given; keep one of them.")
        shape = {"num_classes": num_classes, "in_chans": in_chans}
        try:
            net = timm.create_model(name, pretrained=pretrained, **{k: v for k, v in shape.items() if v is not None})
        except (OSError, RuntimeError) as error:
            raise CheckpointError(
                f"the pretrained weights of {name!r} could not be had: {str(error).splitlines()[0]} "
                "Without a network, pass checkpoint=FILE instead of pretrained=true."
            ) from error
        if checkpoint:
            load_strictly(net, read_state_dict(checkpoint), checkpoint)
        config = net.pretrained_cfg
        weights = checkpoint or ("timm's pretrained weights" if pretrained else None)
        self._own(net, name, weights, mean or config["mean"], std or config["std"])

    @classmethod
    def of(cls, net: nn.Module, num_classes: int, mean: Sequence[float], std: Sequence[float]) -> Self:
        """An original from a network that is already in memory; its weights are taken as trained."""
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        net.num_classes = num_classes  # type: ignore[assignment]
        self._own(net, type(net).__name__, "memory", mean, std)
        return self

    def _own(self, net: nn.Module, name: str, weights: str | None, mean: Sequence[float], std: Sequence[float]) -> None:
        conv = next((m for m in net.modules() if isinstance(m, nn.Conv2d)), None)
        channels = conv.in_channels if conv is not None else len(mean)
        for what, values in (("mean", mean), ("std", std)):
            if len(values) not in (1, channels):
                raise UsageError(
                    f"{what} has {len(values)} numbers, but {name!r} takes images of {channels} channels; "
                    f"pass {channels} numbers (--model.representation.original.{what})."
                )
        self.net = net
        self.places = places_of_weights(net)
        self._frozen = False
        self.name = name
        self.weights_from = weights
        self.num_classes = int(net.num_classes)  # type: ignore[arg-type]
        self.in_chans = channels
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(-1, 1, 1), persistent=False)

    def forward(self, images_BCHW: Tensor, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """Logits (B, num_classes) of pixels in [0, 1].

        Args:
            images_BCHW: Pixels.
            weights: Entries of the network's state dict to use in place of its own, which do not change. A weight that
                the network has under several names is replaced under all of them; give it by one.
        """
        pixels_BCHW = (images_BCHW - self.mean) / self.std
        entries = {place: value for key, value in (weights or {}).items() for place in self.places[key]}
        logits: Tensor = (
            functional_call(self.net, entries, (pixels_BCHW,), tie_weights=False) if entries else self.net(pixels_BCHW)
        )
        return logits

    def freeze(self) -> Self:
        """No gradients, and evaluation mode whatever happens: BatchNorm statistics never move."""
        self._frozen = True
        return self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Self:
        """Training mode, unless it is frozen."""
        return super().train(mode and not self._frozen)

    def require_weights(self, role: str = "original") -> None:
        """Refuse a network that was never trained.

        Raises:
            UsageError: If neither a checkpoint nor pretrained weights were given.
        """
        if self.weights_from is None:
            flag = {"original": "representation.original", "teacher": "teacher"}[role]
            raise UsageError(
                f"the {role} {self.name!r} has random weights; pass --model.{flag}.checkpoint FILE "
                "(or pretrained: true where timm knows some). `lightning fit` with an OriginalModule config trains one."
            )

    def fingerprint(self) -> str:
        """SHA-256 of the weights' names, shapes and bits: two originals are the same if and only if these are equal."""
        return fingerprint(self.net.state_dict())


def fingerprint(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of a state dict, independent of its order."""
    digest = hashlib.sha256()
    for key in sorted(state):
        value = state[key].detach().cpu().contiguous()
        digest.update(f"{key} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
