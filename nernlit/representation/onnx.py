"""The reconstructed network as an ONNX model."""

from importlib.util import find_spec
from pathlib import Path
from typing import final

import torch
from torch import Tensor, nn

from nernlit.errors import UsageError
from nernlit.originals import require_classifier
from nernlit.representation.representation import Representation
from nernlit.storage.files import write_atomically


@final
class _PixelClassifier(nn.Module):
    """A network behind the normalization of its pixels."""

    mean: Tensor
    std: Tensor

    def __init__(self, net: nn.Module, mean_C11: Tensor, std_C11: Tensor) -> None:
        super().__init__()
        self.net = net
        self.register_buffer("mean", mean_C11)
        self.register_buffer("std", std_C11)

    def forward(self, pixels: Tensor) -> Tensor:
        logits: Tensor = self.net((pixels - self.mean) / self.std)
        return logits


def write_onnx(representation: Representation, path: str | Path, image_size: int | None = None) -> None:
    """Write the reconstructed network atomically as an ONNX model.

    Its input `pixels` is float32 of shape (batch, channels, size, size) with values in [0, 1], which the model
    normalizes itself; its output `logits` is (batch, classes). Any batch size works.

    Args:
        representation: Whose network is written.
        path: The file, NAME.onnx.
        image_size: Height and width of the images in pixels; by default those that timm states for the network.

    Raises:
        UsageError: If the path does not end in .onnx, the packages that torch needs for it are not installed, no
            image size is known, the network is no image classifier, or torch cannot export it.
        StorageError: If the file cannot be written.
    """
    original = representation.original
    require_classifier("an ONNX model of pixels", original.name, original.num_classes)
    if Path(path).suffix != ".onnx":
        raise UsageError(f"{path}: expected a file name that ends in .onnx.")
    if missing := [name for name in ("onnx", "onnxscript") if find_spec(name) is None]:
        raise UsageError(
            f"writing ONNX needs the Python package {' and '.join(missing)}; install it: pip install 'nernlit[onnx]'."
        )
    if image_size is None:
        config = getattr(original.net, "pretrained_cfg", None)
        if config is None:
            raise UsageError(f"{original.name!r} does not state the size of its images; pass the image size in pixels.")
        image_size = int(config["input_size"][-1])
    module = _PixelClassifier(representation.module(), original.mean, original.std).to("cpu").eval()
    pixels_BCHW = torch.rand(2, original.in_chans, image_size, image_size)
    try:
        program = torch.onnx.export(
            module,
            (pixels_BCHW,),
            input_names=["pixels"],
            output_names=["logits"],
            dynamic_shapes={"pixels": {0: torch.export.Dim("batch")}},
            dynamo=True,
            verbose=False,
        )
    except (RuntimeError, ValueError) as error:  # torch's own export errors are RuntimeErrors
        reason = " ".join(str(error).split())[:500]
        raise UsageError(
            f"torch cannot export {original.name!r} for images of {image_size}x{image_size} pixels: {reason}"
        ) from error
    assert program is not None  # with dynamo=True there always is one
    write_atomically(Path(path), program.model_proto.SerializeToString())
