"""Checks for values that are not finite: in a fit they mean divergence, in an evaluation there is no accuracy."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from nernlit.errors import DivergenceError

#: Steps between two checks on an accelerator or with several processes, where a check synchronizes.
_CHECK_INTERVAL = 50

ADVICE = "lower the learning rate (the optimizer's lr); earlier checkpoints are kept"


def all_finite(tensors: Iterable[Any]) -> Tensor:
    """Whether all floating-point numbers of these tensors are finite (a boolean tensor, not read yet)."""
    checked = [value.isfinite().all() for value in tensors if isinstance(value, Tensor) and value.is_floating_point()]
    return torch.stack(checked).all() if checked else torch.tensor(True)


def not_finite(named: Mapping[str, Any]) -> list[str]:
    """The names of the tensors with a value that is not finite."""
    if bool(all_finite(named.values())):  # reads one number from the device, and not one per tensor
        return []
    return [name for name, value in named.items() if not bool(all_finite([value]))]


class FiniteLossCheck:
    """Raises an error for the first step of a fit whose loss terms are not finite.

    On a CPU every step is checked at once. Elsewhere each check would make the step wait for the device, so several
    steps are checked together, and always before a validation or a checkpoint.

    Args:
        at_once: Whether each step is checked by itself.
        joined: Logical AND of flags (0 or 1) over all processes, which call it at the same steps.
    """

    def __init__(self, at_once: bool, joined: Callable[[Tensor], Tensor]) -> None:
        self._together = 1 if at_once else _CHECK_INTERVAL
        self._joined = joined
        self._pending: list[tuple[int, Any, Mapping[str, Tensor]]] = []

    def record(self, step: int, learning_rate: Any, terms: Mapping[str, Tensor]) -> None:
        """Record a step's loss terms."""
        self._pending.append((step, learning_rate, {name: term.detach() for name, term in terms.items()}))
        if (step + 1) % self._together == 0:  # a resumed fit checks at the same steps
            self.check()

    def check(self) -> None:
        """Check the steps that have not been checked yet.

        Raises:
            DivergenceError: If a term is not finite.
        """
        noted, self._pending = self._pending, []
        if not noted:
            return
        values = torch.stack([term.float() for _, _, terms in noted for term in terms.values()])
        finite = self._joined(values.isfinite().int())
        if bool(finite.all()):
            return
        first = int(finite.argmin())
        places = [(step, rate, name) for step, rate, terms in noted for name in terms]
        step, rate, name = places[first]
        own = float(values[first])
        value = "not finite on another process" if math.isfinite(own) else str(own)
        raise DivergenceError(
            f"the fit has diverged: at step {step} train/{name} is {value} (learning rate {float(rate):g}); {ADVICE}."
        )
