"""Continuing after divergence: from the last good state, with half the learning rate."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, Protocol, final

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch.optim import LBFGS, Optimizer

from nernlit.errors import DivergenceError, UsageError, require_one_of
from nernlit.training.divergence import ADVICE

OnDivergence = Literal["stop", "restart"]
#: Most restarts of a fit; after them the learning rate is 1/32 of the schedule's.
MAX_RESTARTS = 5

#: What changes in training beside the optimizer: entries of any kind that can be copied and saved.
State = dict[str, Any]


class Recoverable(Protocol):
    """A Lightning module whose training can continue from an earlier state."""

    @property
    def trainer(self) -> Trainer:
        """The trainer of the current fit; its first optimizer is that of the current stage."""

    def trained_state(self) -> State:
        """What training changes within a stage, except the optimizer; no copy."""

    def load_trained_state(self, state: State) -> None:
        """Return to such a state."""

    def refuse_divergence(self) -> None:
        """Raise a `DivergenceError` if a loss so far, or a weight now, is not finite."""


@final
class Recovery:
    """Keeps the last good state of a fit, and returns to it when the fit diverges.

    A restart takes back the trained parameters and the optimizer's state, but not the position: the fit continues with
    the same step, and so does the schedule, of which all learning rates are halved for the rest of the fit.

    Args:
        on_divergence: `restart`, or `stop` to end the fit with the error.

    Attributes:
        on_divergence: See above.
        restarts: Restarts so far, also those of the fit that was resumed.
        step: Optimizer steps that the kept state has seen; None if no state is kept.
    """

    def __init__(self, on_divergence: OnDivergence) -> None:
        require_one_of(OnDivergence, on_divergence=on_divergence)
        self.on_divergence = on_divergence
        self.restarts = 0
        self.step: int | None = None
        self._state: State = {}
        self._lowers = False

    @property
    def restarts_fits(self) -> bool:
        """Whether a fit that diverges continues."""
        return self.on_divergence == "restart"

    @property
    def factor(self) -> float:
        """The ratio of the learning rates to those of the schedule."""
        return 0.5**self.restarts

    @torch.inference_mode(False)  # validations have it on, and what is copied in it could not be trained
    def keep(self, module: Recoverable) -> None:
        """With `restart`: keep a copy of the module's state, which is good.

        Raises:
            UsageError: See `require_support`.
        """
        if not self.restarts_fits:
            return
        optimizer = module.trainer.optimizers[0]
        self.require_support(optimizer)
        self.step = module.trainer.global_step
        self._state = copy.deepcopy({**module.trained_state(), "optimizer": optimizer.state_dict()})

    def require_support(self, optimizer: Optimizer) -> None:
        """With `restart`: refuse an optimizer that a restart cannot continue.

        Raises:
            UsageError: If it does not take its learning rate from its parameter groups, or uses its state before it
                computes the loss.
        """
        if self.restarts_fits and (getattr(optimizer, "schedules_itself", False) or isinstance(optimizer, LBFGS)):
            raise UsageError(
                f"on_divergence=restart does not work with the optimizer {type(optimizer).__name__}; pass "
                "--model.on_divergence stop, or another optimizer."
            )

    def keep_if_finite(self, module: Recoverable) -> None:
        """With `restart`: keep a copy of the module's state, or return to the last one if the fit has diverged."""
        if not self.restarts_fits or self.step == module.trainer.global_step:
            return
        try:
            module.refuse_divergence()
        except DivergenceError as error:
            self.restart(error, module)
        self.keep(module)

    @torch.inference_mode(False)
    def restart(self, error: DivergenceError, module: Recoverable) -> None:
        """Return to the kept state.

        Raises:
            DivergenceError: The given one, if the fit is to stop; another if it has been restarted too often.
        """
        if not self.restarts_fits or self.step is None:
            raise error
        found = str(error).removesuffix(f"; {ADVICE}.")
        if self.restarts == MAX_RESTARTS:
            raise DivergenceError(f"{found}, after {MAX_RESTARTS} restarts; {ADVICE}.") from error
        self.restarts += 1
        state = copy.deepcopy(self._state)  # an optimizer changes the tensors that it loads
        _load_optimizer(module.trainer.optimizers[0], state.pop("optimizer"), 0.5 if self._lowers else 1.0)
        module.load_trained_state(state)
        rank_zero_warn(
            f"{found}; continuing from the state after step {self.step} with {self.factor:g} times the learning rate "
            f"(restart {self.restarts} of at most {MAX_RESTARTS})."
        )
        for logger in module.trainer.loggers:
            logger.log_metrics({"restarts": self.restarts}, module.trainer.global_step)

    @contextmanager
    def lowered(self, optimizer: Optimizer) -> Iterator[None]:
        """A context in which the optimizer has the lowered learning rates, also if a restart lowers them further, and
        the rates of groups have their ratios to the schedule's (`build_optimizer`).

        Outside of it the rates are those of the schedule, which may compute each from the one before.
        """
        rates = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * self.factor * group.get("lr_ratio", 1.0)
        self._lowers = True
        try:
            yield
        finally:
            self._lowers = False
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate

    def state_dict(self, step: int) -> State:
        """What a checkpoint of this step needs; empty for a fit that cannot have been restarted.

        The kept state is left out where it is that of the checkpoint.
        """
        if not self.restarts_fits and not self.restarts:
            return {}
        kept = {} if self.step in (None, step) else {"step": self.step, "state": self._state}
        return {"restarts": self.restarts, **kept}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what a checkpoint has."""
        self.restarts, self.step = state.get("restarts", 0), state.get("step")
        self._state = state.get("state", {})


def _load_optimizer(optimizer: Optimizer, state: State, factor: float) -> None:
    """Load an optimizer's state, but keep its current learning rates, times a factor."""
    rates = [group["lr"] for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate * factor
    optimizer.zero_grad()  # accumulated gradients of the diverged parameters
