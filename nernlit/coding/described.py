"""What the header of a .nern file describes: built without importing anything, in bounded memory."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nernlit.coding.prediction import bind, require_kernel_size
from nernlit.errors import FileFormatError, LayoutError
from nernlit.kernels import Layout
from nernlit.predictors import Predictor

_GIB = 2**30


def predictor_classes() -> dict[str, type[Predictor]]:
    """The imported subclasses of `Predictor` by the names that files have for them.

    A class that was written by a script or notebook (`__main__`) is found in the module that it is in now.
    """
    found: dict[str, type[Predictor]] = {}
    waiting: list[type[Predictor]] = [Predictor]  # type: ignore[type-abstract]
    while waiting:
        for cls in waiting.pop().__subclasses__():
            found.setdefault(f"__main__.{cls.__qualname__}", cls)
            found[f"{cls.__module__}.{cls.__qualname__}"] = cls
            waiting.append(cls)
    return found


def described_layout(specification: Mapping[str, Any]) -> Layout:
    """The layout of a specification's layers.

    Raises:
        LayoutError: If there are none, a shape is not two to five positive integers, or the description of blocks
            is invalid.
    """
    layers = [(key, tuple(shape)) for key, shape in specification["layers"].items()]
    if any(not 2 <= len(shape) <= 5 or any(type(size) is not int or size < 1 for size in shape) for _, shape in layers):
        raise LayoutError("a layer shape is not a list of two to five positive integers.")
    aliases = {key: tuple(names) for key, names in specification.get("aliases", {}).items()}
    return Layout(layers, aliases, specification["pointwise"], specification["tile"])


def require_memory(numbers: int, path: Path, max_gib: float) -> None:
    """Refuse to decode if `numbers` values of 4 bytes need more than `max_gib` GiB.

    Raises:
        FileFormatError: With the memory that is needed.
    """
    gib = 4 * numbers / _GIB
    if gib > max_gib:
        raise FileFormatError(
            f"decoding {path} needs {gib:.3g} GiB; pass max_gib={math.ceil(gib)} to load it if you trust the file."
        )


def described_predictor(
    described: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    layout: Layout,
    path: Path,
    max_gib: float,
) -> Predictor:
    """The predictor of a specification, bound to its layout, with the file's tensors `predictor.*` as its state.

    Memory for it is taken only after the shapes of the file's tensors have been found to be the described ones.

    Args:
        described: The path of its class, a subclass of `Predictor` that is imported already, and its arguments.
        tensors: The file's tensors.
        layout: The predicted weights.
        path: The file, for messages.
        max_gib: Most memory that the predictor may need.

    Raises:
        FileFormatError: If there is no such class, or the predictor needs more memory.
        LayoutError: If the tensors do not have the shapes of the described predictor's, or its kernels are smaller
            than the layout's.
    """
    known = predictor_classes()
    state = {n.removeprefix("predictor."): v for n, v in tensors.items() if n.startswith("predictor.")}

    def built(part: Mapping[str, Any]) -> Predictor:
        name = str(part["class_path"])
        if name not in known:
            raise FileFormatError(
                f"the file's predictor is a {name[:100]}, which is not imported; import its module (on the command "
                "line: --import MODULE)."
            )
        nested: dict[str, Any] = {
            n: built(v) if isinstance(v, dict) and "class_path" in v else v for n, v in part["init_args"].items()
        }
        return known[name](**nested)

    def bound() -> Predictor:
        predictor = built(described).eval()  # its predictions are checked
        require_kernel_size(predictor, layout)
        bind(predictor, layout)
        return predictor

    with torch.device("meta"):
        predictor = bound()
        shapes = predictor.stored_shapes()
    if shapes.keys() != state.keys() or any(s is not None and s != state[name].shape for name, s in shapes.items()):
        raise LayoutError("the tensors of the predictor do not match its description in the header.")
    require_memory(sum(value.numel() for value in predictor.parameters()), path, max_gib)
    predictor = bound()
    predictor.load_stored(state)
    return predictor
