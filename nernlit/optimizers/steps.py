"""Optimizers and schedules that must know how long the run is."""

from typing import Protocol, runtime_checkable


@runtime_checkable
class NeedsTotalSteps(Protocol):
    """Told the number of optimizer steps of the whole run before the first of them."""

    def set_total_steps(self, total_steps: int) -> None:
        """Plan for `total_steps` steps."""
