"""The `ranger21` package (Wright and Demeure 2021, arXiv 2106.13731) made fit for Lightning.

What the package does and this adapter cannot change: it warms up and down by itself, so that schedulers and
learning-rate monitors see a constant rate; its weight decay and norm loss reach the last parameter only. What is
mended: it learns the run's length from the module, it is silent, and its counters are saved, so that a resumed run is
the same to the bit.
"""

from collections.abc import Iterable
from typing import Any, final

import ranger21.ranger21 as package
from torch.nn import Parameter

from nernlit.errors import require_at_least

# The package prints some thirty lines an instance and more during training; there is no switch.
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
    """Ranger21 for a run whose length the module fills in.

    Args:
        params: What is trained.
        lr: Learning rate at the plateau.
        weight_decay: See the module's note on what it reaches.
        betas: Of the two moments.
        options: Further arguments of the package's class, for example `{use_madgrad: true}`.
    """

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
