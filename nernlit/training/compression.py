"""`compress`: compression of a network in memory, with any iterable of image batches."""

import copy
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, final

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from nernlit.coding import KeptForm
from nernlit.errors import DataError, UsageError, require_at_least, require_positive
from nernlit.kernels import Layout
from nernlit.optimizers import WarmupCosine
from nernlit.originals import Original, require_pixels, require_plain_weights
from nernlit.predictors import Quantize, Table
from nernlit.predictors.scales import Scale
from nernlit.representation import Representation
from nernlit.training.decoupled_distill import DecoupledDistill
from nernlit.training.rate import Rate

#: How compression stores the tensors that are not predicted; docs/results.md compares it with fp16.
KEPT: KeptForm = "int8"
#: Bits per weight without another size.
BITS = 1.75


# The caller's modes and random state do not matter, and stay as they are.
@torch.inference_mode(False)
@torch.enable_grad()
@torch.random.fork_rng()
def compress(
    net: nn.Module,
    images: Iterable[Any],
    target_bytes: int | None = None,
    bits: float | None = None,
    steps: int = 3000,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    teacher: Original | None = None,
    teacher_flip: bool = False,
) -> Representation:
    """A small representation of an image classifier; `save(path, "int8", fold_batch_norm=True)` writes the file.

    The weights are quantized with learned step sizes and trained by distillation from the network itself (or
    `teacher`), without labels.

    Args:
        net: The classifier, from pixels (B, C, H, W), normalized with `mean` and `std`, to logits. It is not changed.
        images: Batches of images (B, C, H, W): tensors, or (images, labels) pairs. Pixels in [0, 1] with `mean` or
            `std`; as the network expects them without. Iterated repeatedly until all steps are done.
        target_bytes: Size of the file; None for `bits`.
        bits: Bits per weight; None for 1.75, or for `target_bytes`.
        steps: Training steps, each with one batch.
        mean: Pixel mean that the network expects to be subtracted, one number or one per channel.
        std: Pixel standard deviation; likewise.
        teacher: A better classifier with the same classes to learn from; by default the network itself.
        teacher_flip: Whether the teacher's logits are averaged over each image and its mirror image. This is more
            accurate where mirror images have the same class.

    Raises:
        UsageError: If an option is out of its range, `images` can be iterated only once, the weights are not plain
            float32 parameters, or the network cannot process the images or does not return logits (B, C).
        DivergenceError: If the training diverges.
        DataError: If there are no batches, or they are no images.
        LayoutError: If the network has no convolution and no linear layer.
    """
    require_at_least(1, steps=steps)
    if target_bytes is not None and bits is not None:
        raise UsageError(f"target_bytes={target_bytes} and bits={bits} are both given; pass one of them.")
    if bits is not None:
        require_positive(bits=bits)
    if target_bytes is not None:
        require_positive(target_bytes=target_bytes)
    if isinstance(images, Iterator):
        raise UsageError(
            f"images is a {type(images).__name__}, which can be iterated only once; pass a list or a DataLoader."
        )
    require_plain_weights(net, type(net).__name__)  # before the forward pass, whose error message would be less clear
    pixels_BCHW = next(iter(_Batches(images, 1)))[0].cpu()
    channels = pixels_BCHW.shape[1]
    normalizes = mean is not None or std is not None  # otherwise images may be normalized already
    if normalizes:
        require_pixels(pixels_BCHW)
    mean, std = (
        _per_channel(0.0 if mean is None else mean, channels),
        _per_channel(1.0 if std is None else std, channels),
    )
    with torch.no_grad():
        net = copy.deepcopy(net).cpu().eval()  # the original is frozen
        try:
            logits = net(pixels_BCHW[:1].clone())  # a network may normalize in place
        except RuntimeError as error:
            raise UsageError(
                f"the network cannot process images of shape {tuple(pixels_BCHW.shape)}: {' '.join(str(error).split())}"
            ) from error
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        raise UsageError("the network does not return logits (B, C); wrap it in a module that does.")
    original = Original.from_module(net, num_classes=logits.shape[1], mean=mean, std=std, in_chans=channels)
    representation = quantized_table(original)
    if target_bytes is None and bits is None:
        bits = BITS
    module = DecoupledDistill(
        representation,
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=2e-2),
        scheduler=lambda optimizer: WarmupCosine(optimizer, warmup_steps=20),
        teacher=teacher,
        temperature=4.0,
        teacher_flip=teacher_flip,
        rate=Rate(target_bytes=target_bytes, target_bits=bits, kept=KEPT, fold_batch_norm=True),
    )
    module.checks_pixels = normalizes
    trainer = L.Trainer(
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        devices=1,
    )
    try:
        trainer.fit(module, DataLoader(_Batches(images, steps), batch_size=None))
    except SystemExit as error:  # Lightning's answer to Ctrl-C, which is for programs of its own
        if not isinstance(error.__context__, KeyboardInterrupt):
            raise
        raise KeyboardInterrupt from None
    return representation.eval()


def _per_channel(values: float | Sequence[float], channels: int) -> list[float]:
    """One number for each channel."""
    return [float(values)] * channels if isinstance(values, int | float) else [float(value) for value in values]


def quantized_table(original: Original, bits: float = 2.0, scale: Scale = "layer") -> Representation:
    """The representation that compression trains: every weight is rounded.

    Args:
        original: The network.
        bits: Bits per weight at the start.
        scale: Which weights have the same scale and so the same step size: those of a layer, or of a filter.
    """
    height, width = Layout.from_module(original.net, "all", "tile", tile=1).block
    # Tiles of 3 x 3 at least: with tiles of one weight the table would have an address for each weight.
    return Representation(
        original,
        Table((max(height, 3), max(width, 3)), scale),
        layers="all",
        order="none",
        pointwise="tile",
        quantize=Quantize(bits),
        tune_kept="affine",
    )


@final
class _Batches(IterableDataset[tuple[Tensor, Tensor]]):
    """Yields `count` batches of pixels, with the dummy label -1 for each image."""

    def __init__(self, images: Iterable[Any], count: int) -> None:
        self.images, self.count = images, count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        done = 0
        while done < self.count:
            before = done
            try:
                batches = iter(self.images)
            except TypeError as error:
                raise DataError(f"images: {error}; expected batches of pixels: a list, or a DataLoader.") from error
            for batch in batches:
                if done == self.count:
                    return
                pixels = _pixels(batch)
                done += 1
                yield pixels, torch.full((len(pixels),), -1)
            if done == before:
                after = f" after the first {done}; pass a list or a DataLoader, which can be read again" if done else ""
                raise DataError(f"the images have no batch{after}.")


def _pixels(batch: Any) -> Tensor:
    """The pixels of a batch.

    Raises:
        DataError: If it has none.
    """
    pixels = batch[0] if isinstance(batch, tuple | list) and len(batch) else batch
    if isinstance(pixels, Tensor) and pixels.dim() == 4 and pixels.is_floating_point():
        if not bool(pixels.isfinite().all()):
            raise DataError("a batch of images has pixels that are not finite; expected pixels in [0, 1].")
        return pixels.float()
    given = f"{tuple(pixels.shape)} {pixels.dtype}" if isinstance(pixels, Tensor) else type(pixels).__name__
    raise DataError(f"a batch of images is {given}; expected floating-point pixels (B, C, H, W) in [0, 1].")
