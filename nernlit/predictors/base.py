"""The base class of predictors.

Shapes: N kernels, K x K their size (height Kh and width Kw, which may differ).
"""

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from nernlit.errors import UsageError
from nernlit.storage.entropy import Part
from nernlit.utilities.constants import WithConstants
from nernlit.utilities.sides import Size, shortest, sides


class Predictor(WithConstants, ABC):
    """Maps addresses to kernels.

    A subclass must store every constructor argument as an attribute of the same name (scikit-learn's convention), so
    that a checkpoint can record how its predictor is built. To be trained by Progressive, every module with parameters
    needs a method `reset_parameters`, as torch's modules have. Register tables that are not trained with
    `set_constant`, not as buffers: callbacks that average weights would average buffers too.

    Args:
        kernel_size: Size of the predicted kernels: the side of a square, or (height, width). A layer with smaller
            kernels uses their center crop.

    Raises:
        UsageError: If `kernel_size` is neither one nor two numbers of at least 1.
    """

    #: Rows and columns of each layer's weights within its kernels; the rest of a kernel is not used. A representation
    #: sets it before it calls `bind`. None: all numbers are used.
    crops: Sequence[tuple[slice, slice]] | None = None
    #: Whether it is the predictor of a representation.
    is_bound = False

    def __init__(self, kernel_size: Size = 3) -> None:
        super().__init__()
        try:
            self.kernel_size = shortest(sides(kernel_size))
        except ValueError as error:
            raise UsageError(f"kernel_size={kernel_size}; {error}.") from error

    @property
    def block(self) -> tuple[int, int]:
        """Height and width (Kh, Kw) of the predicted kernels."""
        return sides(self.kernel_size)

    @abstractmethod
    def bind(self, layers: Sequence[tuple[int, int]]) -> None:
        """Prepare for the addresses of these layers. The representation calls it once.

        Parameters may be created here. A .nern file is checked by calling it on torch's meta device, so it must not
        depend on the values of tensors.

        Args:
            layers: The numbers of filters and channels of each layer. Layer l of size (O, I) has the addresses
                (l, 0..O-1, 0..I-1).
        """

    @abstractmethod
    def forward(self, addresses_N3: Tensor) -> Tensor:
        """Kernels (N, K, K) of integer addresses (N, 3): layer number, filter position, channel position."""

    def fit(self, blocks_NKK: Tensor, addresses_N3: Tensor, weights_NKK: Tensor) -> None:
        """Initialize the parameters from the kernels to predict; does nothing by default.

        A representation calls it after `bind` when it is built from an original, and not when it is loaded from a file.

        Args:
            blocks_NKK: The kernels, in the units of `forward`.
            addresses_N3: The address of each; all addresses of the representation.
            weights_NKK: Weight of the squared error of each entry; 0 outside the crop of a smaller kernel.
        """

    @property
    def changes_after_steps(self) -> bool:
        """Whether `after_step` changes the predictions."""
        return False

    def after_step(self, relative_rate: float, mean: Callable[[Tensor], Tensor] = torch.positive) -> dict[str, float]:
        """Change what an optimizer cannot, such as integers. Called after each optimizer step; by default does nothing.

        Args:
            relative_rate: The step's learning rate as a share of the schedule's highest.
            mean: Averages a tensor over all processes. Their predictors must remain equal.

        Returns:
            Metrics by name, which are logged as `train/<name>`.
        """
        return {}

    def training_state(self) -> dict[str, Tensor]:
        """What `after_step` depends on and predictions do not. Checkpoints of fits hold it, .nern files do not."""
        return {}

    def load_training_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over the training state of a checkpoint; an empty one is that of the start of a stage."""

    def start_stage(self) -> None:
        """Called when another objective begins to train the predictor; its predictions must not change."""
        self.load_training_state({})

    @property
    def unquantized(self) -> "Predictor":
        """The predictor inside a `Quantized`; any other predictor is returned as it is."""
        return self

    @property
    def num_params(self) -> int:
        """Number of parameters, without unused entries; stored integers are counted by `code_bits`."""
        unused = sum(int((~used).sum()) for used in self.used_masks().values())
        return sum(p.numel() for p in self.parameters()) - unused

    @property
    def code_bits(self) -> int:
        """Bits of the stored integers that are not parameters."""
        return 0

    def stored_code_bits(self, stored: Mapping[str, Tensor]) -> int:
        """Like `code_bits`, but takes the result of `stored()`, which is expensive to compute."""
        return self.code_bits

    @property
    def is_fitted(self) -> bool:
        """Whether the predictor already approximates the original after `fit`, so that phase 1 can be skipped."""
        return False

    def lr_multipliers(self) -> dict[str, float]:
        """Learning-rate multipliers: parameter name -> its learning rate / the optimizer's. Others have 1."""
        return {}

    def quantized_parts(self) -> dict[str, list[Part]]:
        """The parameters that quantization rounds: name -> the shapes of consecutive parts of their numbers.

        Each part, or each of its rows, gets a step size, and the file's code learns what numbers of the same row, the
        same column or the same kernel of a part have in common. By default the parameters with two dimensions or more
        are one part each. Call it after `bind`.
        """
        shapes = {name: value.shape for name, value in self.named_parameters() if value.dim() > 1}
        return {
            name: [(shape[0], shape[1], math.prod(shape[2:-1]), shape[-1] if len(shape) > 2 else 1)]
            for name, shape in shapes.items()
        }

    def used_masks(self) -> dict[str, Tensor]:
        """Masks of quantized parameters that have unused entries: name -> bool tensor of the parameter's shape.

        True marks the used entries; `quantized_parts` describes only these.
        """
        return {}

    def frozen_forward(self) -> Callable[[Tensor], Tensor]:
        """`forward` with the current parameters; work that depends on parameters alone is done once for all calls."""
        return self

    def stored(self) -> dict[str, Tensor]:
        """The tensors of the .nern file; by default the state dict, with only those numbers of `used_masks`."""
        used = self.used_masks()
        return {name: value[used[name]] if name in used else value for name, value in self.state_dict().items()}

    def stored_shapes(self) -> dict[str, torch.Size | None]:
        """The names and shapes of `stored()`; None for bytes of variable length. Works on the meta device."""
        used, parts = self.used_masks(), self.quantized_parts()
        return {
            name: torch.Size([sum(map(math.prod, parts[name]))]) if name in used else value.shape
            for name, value in self.state_dict().items()
        }

    def load_stored(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `stored()` returned; the shapes are those of `stored_shapes`."""
        placed = {
            name: tensors[name].new_zeros(used.shape).masked_scatter(used.to(tensors[name].device), tensors[name])
            for name, used in self.used_masks().items()
        }
        self.load_state_dict({**tensors, **placed})

    def specification(self) -> dict[str, Any]:
        """The class path and the constructor's arguments, as JSON-compatible values.

        Keyword-only arguments are left out where they have their default values. So a class can get further options,
        and the specifications in earlier checkpoints stay the same.

        Raises:
            UsageError: If an argument is not stored as an attribute, or is not JSON-compatible.
        """
        cls = type(self)
        arguments = {}
        for name, parameter in inspect.signature(cls).parameters.items():
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                raise UsageError(
                    f"the constructor of {cls.__name__} takes {parameter}; a predictor's arguments must be named, so "
                    "that checkpoints can record how it is built."
                )
            if not hasattr(self, name):
                raise UsageError(
                    f"{cls.__name__} does not store its constructor's argument {name!r}; set self.{name} = {name} in "
                    "__init__, so that checkpoints can record how the predictor is built."
                )
            value = getattr(self, name)
            if parameter.kind != parameter.KEYWORD_ONLY or value != parameter.default:
                arguments[name] = _primitive(value, f"{cls.__name__}.{name}")
        return {"class_path": f"{cls.__module__}.{cls.__qualname__}", "init_args": arguments}


def _primitive(value: object, where: str) -> Any:
    """A value as it is written to checkpoints: None, bool, int, float, str, or lists and dictionaries of them."""
    if isinstance(value, Predictor):
        return value.specification()
    if value is None or isinstance(value, bool):
        return value
    for kind in (int, float, str):
        if isinstance(value, kind):
            return kind(value.value if isinstance(value, Enum) else value)  # a subclass would be pickled as code
    if isinstance(value, list | tuple):
        return [_primitive(part, f"{where}[{number}]") for number, part in enumerate(value)]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _primitive(part, f"{where}.{key}") for key, part in value.items()}
    raise UsageError(
        f"{where} is {value!r} of type {type(value).__name__}; a predictor's arguments must be numbers, strings, other "
        "predictors, or lists and dictionaries of them, so that checkpoints can hold them."
    )
