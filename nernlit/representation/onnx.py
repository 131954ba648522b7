"""The reconstructed network as an ONNX model."""

import re
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, final

import torch
from packaging.version import Version
from torch import Tensor, nn
from torch.func import functional_call

from nernlit.errors import UsageError
from nernlit.originals import require_classifier
from nernlit.representation.integers import IntegerWeight, integer_weights
from nernlit.representation.representation import Representation
from nernlit.storage.files import write_atomically

_ANSI_COLORS = re.compile(r"\x1b\[[0-9;]*m")
#: The oldest torch whose exporter converts the networks of the tests.
_OLDEST_TORCH = "2.8"


def can_write_onnx() -> bool:
    """Whether this torch is recent enough for `write_onnx`."""
    return Version(torch.__version__) >= Version(_OLDEST_TORCH)


@final
class _PixelClassifier(nn.Module):
    """Pixel normalization followed by a network.

    Args:
        net: The network.
        mean_C11: Mean of the pixels.
        std_C11: Their standard deviation.
        keys: Weights of the network that are further inputs, in this order.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, net: nn.Module, mean_C11: Tensor, std_C11: Tensor, keys: Sequence[str] = ()) -> None:
        super().__init__()
        self.net, self.keys = net, keys
        self.register_buffer("mean", mean_C11)
        self.register_buffer("std", std_C11)

    def forward(self, pixels: Tensor, weights: Sequence[Tensor] = ()) -> Tensor:
        given = dict(zip(self.keys, weights, strict=True))
        logits: Tensor = functional_call(self.net, given, ((pixels - self.mean) / self.std,))
        return logits


def write_onnx(
    representation: Representation,
    path: str | Path,
    image_size: int | tuple[int, int] | None = None,
    integers: bool = False,
) -> None:
    """Write the reconstructed network atomically as an ONNX model.

    Its input `pixels` is float32 of shape (batch, channels, height, width) with values in [0, 1], which the model
    normalizes itself; its output `logits` is (batch, classes). Any batch size works.

    Args:
        representation: Whose network is written.
        path: The file, NAME.onnx.
        image_size: Height and width of the images in pixels, one number if they are equal; by default those of the
            network, if timm made it.
        integers: Whether predicted weights are stored as integers, int4 where all of a weight's are within -7..7 and
            int8 elsewhere, each followed by DequantizeLinear. Only a quantized `Table` has such integers.

    Raises:
        UsageError: If the path does not end in .onnx, torch is too old or the packages that it needs are missing, no
            image size is known, the network is no image classifier, torch cannot export it, or `integers` is set and
            the predictor has none (see `integer_weights`).
        StorageError: If the file cannot be written.
    """
    original = representation.original
    require_classifier("an ONNX model of pixels", original.name, original.num_classes)
    if Path(path).suffix != ".onnx":
        raise UsageError(f"{path}: expected a file name that ends in .onnx.")
    if not can_write_onnx():
        raise UsageError(f"writing ONNX needs torch {_OLDEST_TORCH} or later, and this is torch {torch.__version__}.")
    if missing := [name for name in ("onnx", "onnxscript") if find_spec(name) is None]:
        raise UsageError(
            f"writing ONNX needs the Python package {' and '.join(missing)}; install it: pip install 'nernlit[onnx]'."
        )
    if image_size is None:
        if original.image_size is None:
            raise UsageError(f"{original.name!r} does not state the size of its images; pass the image size in pixels.")
        image_size = original.image_size
    stored = integer_weights(representation) if integers else {}
    module = _PixelClassifier(representation.module(), original.mean, original.std, tuple(stored)).to("cpu").eval()
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    pixels_BCHW = torch.rand(2, original.in_chans, height, width)
    # Weights that are inputs are not merged with other constants.
    weights = [weight.integers.float() for weight in stored.values()]
    inputs = (pixels_BCHW, weights) if weights else (pixels_BCHW,)
    try:
        program = torch.onnx.export(
            module,
            inputs,
            input_names=["pixels", *stored],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")}, [{} for _ in stored])[: len(inputs)],
            opset_version=21 if integers else None,  # the first with int4
            dynamo=True,
            verbose=False,
        )
    except (RuntimeError, ValueError) as error:  # torch's own export errors are RuntimeErrors
        reason = " ".join(_ANSI_COLORS.sub("", str(error.__cause__ or error)).split())[:500]
        raise UsageError(
            f"torch cannot export {original.name!r} for images of {height}x{width} pixels: {reason}"
        ) from error
    assert program is not None  # with dynamo=True there always is one
    model = program.model_proto
    graph = model.graph
    _embed_integers(graph, stored)
    for part in (graph, *graph.node, *graph.value_info, *graph.initializer):
        del part.metadata_props[:]  # stack traces of torch's export, with paths of this machine
    write_atomically(Path(path), model.SerializeToString())


def _embed_integers(graph: Any, weights: Mapping[str, IntegerWeight]) -> None:
    """Replace the graph inputs of these weights by integer initializers, each followed by DequantizeLinear."""
    import ml_dtypes
    from onnx import helper, numpy_helper

    nodes = []
    for key, weight in weights.items():
        is_short = int(weight.integers.abs().max()) <= 7
        integers = weight.integers.numpy().astype(ml_dtypes.int4 if is_short else "int8")
        graph.initializer.append(numpy_helper.from_array(integers, f"{key}.integers"))
        graph.initializer.append(numpy_helper.from_array(weight.steps.numpy(), f"{key}.steps"))
        nodes.append(helper.make_node("DequantizeLinear", [f"{key}.integers", f"{key}.steps"], [key], axis=0))
    nodes += graph.node
    del graph.node[:]
    graph.node.extend(nodes)
    inputs = [value for value in graph.input if value.name not in weights]
    del graph.input[:]
    graph.input.extend(inputs)
