"""The protocol of optimizers and schedules that need to know the length of the run."""

from typing import Protocol, runtime_checkable


@runtime_checkable
class NeedsTotalSteps(Protocol):
    """Has `set_total_steps`, which the LightningModule calls before the first step."""

    def set_total_steps(self, total_steps: int) -> None:
        """Set the number of optimizer steps of the whole run."""
