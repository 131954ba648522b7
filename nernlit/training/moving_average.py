"""Exponential moving averages of parameters, which are evaluated and saved instead of the last values."""

from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim.swa_utils import get_ema_multi_avg_fn

from nernlit.errors import CheckpointError, UsageError


@final
class MovingAverage:
    """The exponential moving average of parameters over optimizer steps.

    Training continues from the last values of the parameters. For an evaluation, `show` puts the average in their
    place. All processes compute the same average, because their parameters are equal.

    Args:
        decay: Weight of the average so far in each step, at least 0 and below 1; 0 keeps no average.

    Attributes:
        others: The average by parameter name; the last values while the parameters hold the average.

    Raises:
        UsageError: If it is out of this range.
    """

    def __init__(self, decay: float) -> None:
        if not 0 <= decay < 1:
            raise UsageError(f"ema={decay}; expected a decay of at least 0 and below 1, for example 0.99.")
        self.decay = decay
        self.clear()

    def clear(self) -> None:
        """Forget the average."""
        self.others: dict[str, Tensor] = {}
        self._is_shown = False

    def update(self, parameters: Mapping[str, Parameter]) -> None:
        """Add the values after an optimizer step. The average starts with the values of its first step."""
        if not self.decay:
            return
        values = {name: parameter.detach() for name, parameter in parameters.items()}
        if self.others:
            averages = [self._other(name, value) for name, value in values.items()]
            get_ema_multi_avg_fn(self.decay)(averages, list(values.values()), None)
        else:
            self.others = {name: value.clone() for name, value in values.items()}

    @torch.no_grad()
    def show(self, parameters: Mapping[str, Parameter], average: bool) -> None:
        """Put the average, or else the last values, into the parameters."""
        if average == self._is_shown or not self.others:
            return
        for name, parameter in parameters.items():
            value, other = parameter.clone(), self._other(name, parameter)
            parameter.copy_(other)
            other.copy_(value)
        self._is_shown = average

    def _other(self, name: str, value: Tensor) -> Tensor:
        """The other value of a parameter; one that was loaded moves to the parameter's device."""
        self.others[name] = self.others[name].to(value.device)
        return self.others[name]

    def save(self, checkpoint: dict[str, Any]) -> None:
        """Put the average into the checkpoint's state dict, and the last values beside it."""
        if not self.decay:
            return
        state, others = checkpoint["state_dict"], {name: value.clone() for name, value in self.others.items()}
        last = others if self._is_shown else {name: state[name] for name in others}
        if not self._is_shown:
            state.update(others)
        checkpoint["moving_average"] = {"decay": self.decay, "last": last}

    def load(self, checkpoint: dict[str, Any]) -> None:
        """Take over the average of a checkpoint that a fit is resumed from, and put the last values in its state dict.

        Raises:
            CheckpointError: If its fit had another decay.
        """
        stored = checkpoint.get("moving_average", {"decay": 0.0, "last": {}})
        if stored["decay"] != self.decay:
            raise CheckpointError(
                f"the checkpoint's fit had ema {stored['decay']}, this one has {self.decay}; pass the same, or start a "
                "new fit from its weights (--model.init_from)."
            )
        state, last = checkpoint["state_dict"], stored["last"]
        self.clear()
        self.others = {name: state[name].clone() for name in last}
        state.update(last)
