"""Constants of a module: tensors and networks that it reads and that nothing may change."""

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn


class WithConstants(nn.Module):
    """A module some of whose attributes are constants.

    A constant is neither a parameter, nor a buffer, nor a submodule: it is in no state dict, and neither an optimizer,
    a callback that averages weights, a gradient hook, nor a conversion of types (`half()`, precision `bf16-true`)
    changes it. It follows the module to other devices and into shared memory, and is copied and pickled with it.
    """

    def set_constant(self, name: str, value: Tensor | nn.Module) -> None:
        """Make `self.name` a constant, or replace it.

        Args:
            name: Of the attribute.
            value: Tensor or network.
        """
        self.__dict__[name] = value  # assigned as an attribute, a module would be registered as a submodule
        self.__dict__.setdefault("_constants", {})[name] = None  # an ordered set

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # Not public, but where every move and conversion of a module goes through, its parents' too.
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

        def moved(tensor: Tensor) -> Tensor:
            probe = fn(tensor.new_empty(0, dtype=torch.uint8))  # tells where to, and converts nothing
            there = tensor.to(probe.device)
            return there.share_memory_() if probe.is_shared() else there

        for name in self.__dict__.get("_constants", ()):
            value = self.__dict__[name]
            if isinstance(value, nn.Module):
                value._apply(moved)
            else:
                self.__dict__[name] = moved(value)
        return self
