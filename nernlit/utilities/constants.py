"""Constants of a module: tensors and networks that must not change."""

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn


class WithConstants(nn.Module):
    """A module some of whose attributes are constants.

    A constant is neither a parameter nor a buffer nor a submodule: no state dict contains it, and optimizers, callbacks
    that average weights, gradient hooks and type conversions (`half()`, precision `bf16-true`) do not change it. It
    moves with the module to other devices and into shared memory, and is copied and pickled with it.
    """

    def set_constant(self, name: str, value: Tensor | nn.Module) -> None:
        """Make `self.name` a constant, or replace it.

        Args:
            name: Name of the attribute.
            value: A tensor or a network.
        """
        self.__dict__[name] = value  # assigned as an attribute, a module would be registered as a submodule
        self.__dict__.setdefault("_constants", {})[name] = None  # an ordered set

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # Not public, but the only method that every move and conversion of a module and of its parents calls.
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

        def moved(tensor: Tensor) -> Tensor:
            probe = fn(tensor.new_empty(0, dtype=torch.uint8))  # has the new device; fn does not convert integers
            there = tensor.to(probe.device)
            return there.share_memory_() if probe.is_shared() else there

        for name in self.__dict__.get("_constants", ()):
            value = self.__dict__[name]
            if isinstance(value, nn.Module):
                value._apply(moved)
            else:
                self.__dict__[name] = moved(value)
        return self
