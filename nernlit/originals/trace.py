"""What a network does in one forward pass: its operations, the tensors that each reads, and what its modules are given.

It runs on the meta device, where tensors have shapes and no values. So what is found holds for all weights and images
of these shapes, and a network whose course depends on values cannot be traced.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any, final

import torch
from torch import Tensor, nn

# The public TorchFunctionMode does not see what scripted and C++ code does with a tensor.
from torch.utils._python_dispatch import TorchDispatchMode


@final
class Trace(TorchDispatchMode):
    """Records the operations that run inside its `with`, and the calls of the given modules.

    Attributes:
        operations: The names of the operations that read a tensor, in order.
        calls: Name of a module -> (first input, output) of each of its calls.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[str] = []
        self.calls: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in modules}
        self._modules = modules
        self._readers: dict[int, set[int]] = defaultdict(set)
        self._sources: dict[int, int] = {}
        self._kept: list[Tensor] = []  # a freed tensor's id may come again

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        number = len(self.operations)
        if self._read([args, kwargs or {}], number):
            self.operations.append(str(func))
        for tensor in _tensors(result):
            self._sources.setdefault(id(tensor), number)  # operations in place return a tensor again
            self._kept.append(tensor)
        return result

    def _read(self, value: Any, number: int) -> bool:
        tensors = list(_tensors(value))
        for tensor in tensors:
            self._readers[id(tensor)].add(number)
        self._kept += tensors
        return bool(tensors)

    def source(self, tensor: Tensor) -> int | None:
        """The number of the operation that made a tensor."""
        return self._sources.get(id(tensor))

    def readers(self, tensor: Tensor) -> set[int]:
        """The numbers of the operations that read a tensor, change it, or make a view of it."""
        return self._readers[id(tensor)]

    def run(self, net: nn.Module, images_BCHW: Tensor) -> None:
        """Run a network on the meta device; what it returns counts as read by one more operation."""

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
