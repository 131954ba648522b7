"""Feature taps: inputs or outputs of named modules, collected by hooks without a change of the network's code."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import final

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from nernlit.errors import UsageError

#: NeRN's taps for networks of basic blocks (arXiv 2212.13554): the output of every BatchNorm except those of shortcuts,
#: and the sum at the end of every block before its ReLU. In bottleneck blocks that ReLU is named `act3`.
NERN_TAPS = ("*bn?", "*.act2:input")


@final
class FeatureTaps:
    """Collects the outputs (or, with the suffix `:input`, the first inputs) of modules by name.

    Tensors are cloned, so that an in-place ReLU does not change them afterwards.

    Args:
        net: The network.
        patterns: Shell patterns of module names, each optionally followed by `:input`.

    Raises:
        UsageError: If a pattern matches no module.
    """

    def __init__(self, net: nn.Module, patterns: Sequence[str] = NERN_TAPS) -> None:
        self.taps: dict[str, tuple[nn.Module, bool]] = {}
        for pattern in patterns:
            name_pattern, _, side = pattern.partition(":")
            found = {f"{n}:{side}" if side else n: m for n, m in net.named_modules() if fnmatchcase(n, name_pattern)}
            if not found or side not in ("", "input"):
                some = ", ".join(name for name, _ in list(net.named_modules())[1:6])
                raise UsageError(
                    f"the tap {pattern!r} matches no module of {type(net).__name__} (first: {some}); "
                    "expected patterns of module names, with the suffix `:input` to collect a module's input."
                )
            self.taps |= {name: (module, side == "input") for name, module in found.items()}

    @contextmanager
    def collect(self) -> Iterator[dict[str, Tensor]]:
        """Yields a dictionary, tap name -> map (B, C, H, W), that a forward pass inside the `with` block fills."""
        maps: dict[str, Tensor] = {}
        handles = [self._hook(name, module, of_input, maps) for name, (module, of_input) in self.taps.items()]
        try:
            yield maps
        finally:
            for handle in handles:
                handle.remove()

    @staticmethod
    def _hook(name: str, module: nn.Module, of_input: bool, maps: dict[str, Tensor]) -> RemovableHandle:
        def keep_input(_module: nn.Module, args: tuple[Tensor, ...], options: dict[str, Tensor]) -> None:
            maps[name] = (args[0] if args else next(iter(options.values()))).clone()

        def keep_output(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
            maps[name] = output.clone()

        if of_input:
            return module.register_forward_pre_hook(keep_input, with_kwargs=True)
        return module.register_forward_hook(keep_output)
