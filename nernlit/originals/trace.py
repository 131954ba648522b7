"""A trace of one forward pass: its operations, the tensors that each reads, and the inputs and outputs of its modules.

The pass runs on the meta device, where tensors have shapes but no values. So the trace is valid for all weights and
images of these shapes, and a network whose control flow depends on values cannot be traced.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any, final

import torch
from torch import Tensor, nn

# Not public, but the public TorchFunctionMode does not see operations of scripted and C++ code.
from torch.utils._python_dispatch import TorchDispatchMode


@final
class Trace(TorchDispatchMode):
    """Records the operations that run inside its `with` block, and the calls of the given modules.

    Attributes:
        operations: The names of the operations that read a tensor, in order.
        calls: Module name -> (first input, output) of each of its calls.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[str] = []
        self.calls: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in modules}
        self._modules = modules
        self._readers: dict[int, set[int]] = defaultdict(set)
        self._sources: dict[int, int] = {}
        self._kept: list[Tensor] = []  # keeps tensors alive, because ids of freed objects are reused

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        number = len(self.operations)
        if self._read([args, kwargs or {}], number):
            self.operations.append(str(func))
        for tensor in _tensors(result):
            self._sources.setdefault(id(tensor), number)  # in-place operations return a known tensor
            self._kept.append(tensor)
        return result

    def _read(self, value: Any, number: int) -> bool:
        tensors = list(_tensors(value))
        for tensor in tensors:
            self._readers[id(tensor)].add(number)
        self._kept += tensors
        return bool(tensors)

    def source(self, tensor: Tensor) -> int | None:
        """The number of the operation that created a tensor, or None."""
        return self._sources.get(id(tensor))

    def readers(self, tensor: Tensor) -> set[int]:
        """The numbers of the operations that read a tensor, change it, or make a view of it."""
        return self._readers[id(tensor)]

    def run(self, net: nn.Module, images_BCHW: Tensor) -> None:
        """Run a network on the meta device; its output counts as read by one further operation."""

        def note(name: str, args: tuple[Any, ...], output: Any) -> None:
            if args and isinstance(output, Tensor):
                self.calls[name].append((args[0], output))

        hooks = [
            module.register_forward_hook(lambda _m, args, output, name=name: note(name, args, output))
            for name, module in self._modules.items()
        ]
        try:
            with self:
                answer = net(torch.empty_like(images_BCHW, device="meta"))
        finally:
            for hook in hooks:
                hook.remove()
        self._read(answer, len(self.operations))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)
