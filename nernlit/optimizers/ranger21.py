"""An adapter of the `ranger21` package (Wright and Demeure 2021, arXiv 2106.13731) for Lightning.

Properties of the package that the adapter cannot change: it schedules the learning rate itself, so schedulers and
learning-rate monitors see a constant rate; its weight decay and norm loss apply to the last parameter only. The adapter
passes the length of the run, suppresses the package's prints, and saves its counters, so that a resumed run is equal to
an uninterrupted one bit for bit.
"""

from collections.abc import Iterable
from typing import Any, final

import ranger21.ranger21 as package
from torch.nn import Parameter

from nernlit.errors import require_at_least

# The package prints about thirty lines per instance, and more during training; it has no option to switch that off.
package.print = lambda *_args, **_kwargs: None

_COUNTERS = (
    "lookahead_step",
    "current_iter",
    "current_epoch",
    "epoch_count",
    "current_lr",
    "warmup_complete",
    "warmup_curr_pct",
    "warmdown_displayed",
    "param_size",
)


@final
class Ranger21(package.Ranger21):  # type: ignore[misc]  # the package is untyped
    """Ranger21; the LightningModule sets the length of the run.

    Args:
        params: Parameters to train.
        lr: Learning rate between warm-up and warm-down.
        weight_decay: Applies to the last parameter only.
        betas: Decay rates of the two moments.
        options: Further arguments of the package's class, for example `{use_madgrad: true}`.
    """

    #: Its warm-down replaces the learning rate of a schedule from outside.
    schedules_itself = True

    def __init__(
        self,
        params: Iterable[Parameter],
        lr: float,
        weight_decay: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        options: dict[str, Any] | None = None,
    ) -> None:
        require_at_least(0, weight_decay=weight_decay)
        self._arguments = {"lr": lr, "weight_decay": weight_decay, "betas": tuple(betas), **(options or {})}
        self._plan(list(params), 1)

    def _plan(self, params: list[Any], total_steps: int) -> None:
        super().__init__(
            params, num_epochs=1, num_batches_per_epoch=total_steps, logging_active=False, **self._arguments
        )

    def set_total_steps(self, total_steps: int) -> None:
        """Plan warm-up and warm-down for `total_steps` steps."""
        self._plan([p for group in self.param_groups for p in group["params"]], total_steps)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "counters": {name: getattr(self, name) for name in _COUNTERS}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        state = dict(state_dict)
        for name, value in state.pop("counters").items():
            setattr(self, name, value)
        super().load_state_dict(state)
