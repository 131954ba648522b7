"""The learning-rate schedule of the shipped configurations."""

import math
from typing import Any, final

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from nernlit.errors import UsageError, require_at_least


@final
class WarmupCosine(LRScheduler):
    """Linear warm-up, then half a cosine down to `min_lr`; stepped after each optimizer step.

    The first step of the warm-up has 1 / `warmup_steps` of the learning rate.

    Args:
        optimizer: The optimizer whose learning rates are scheduled.
        warmup_steps: Steps until the full learning rate. A run of no more steps ends during the warm-up.
        min_lr: Learning rate at the end of the run.
        total_steps: Steps of the whole run; nernlit's LightningModules set it.
    """

    def __init__(
        self, optimizer: Optimizer, warmup_steps: int = 0, min_lr: float = 0.0, total_steps: int | None = None
    ) -> None:
        require_at_least(0, warmup_steps=warmup_steps, min_lr=min_lr)
        if total_steps is not None:
            require_at_least(1, total_steps=total_steps)
        self.warmup_steps = warmup_steps
        self.min_lr = min_lr
        self.total_steps = total_steps
        super().__init__(optimizer)
        if min_lr > max(map(float, self.base_lrs)):
            raise UsageError(
                f"min_lr={min_lr} is above the learning rate ({float(max(self.base_lrs)):g}); pass a smaller min_lr."
            )

    def set_total_steps(self, total_steps: int) -> None:
        """Set the length of the run, unless it was given to the constructor."""
        require_at_least(1, total_steps=total_steps)
        self.total_steps = self.total_steps or total_steps

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a saved state, but keep a length that is already set, so that a resumed fit can be longer."""
        planned = self.total_steps
        super().load_state_dict(state_dict)
        self.total_steps = planned or self.total_steps

    def get_lr(self) -> list[float]:  # type: ignore[override]  # torch also allows tensors
        step = self.last_epoch
        if step < self.warmup_steps:
            return [float(rate) * (step + 1) / self.warmup_steps for rate in self.base_lrs]
        if self.total_steps is None:
            if step == 0:  # the constructor calls this before the length can be set
                return [float(rate) for rate in self.base_lrs]
            raise UsageError("WarmupCosine does not know the length of the run; pass total_steps.")
        share = min(1.0, (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps))
        weight = (1 + math.cos(math.pi * share)) / 2
        highest = max(float(rate) for rate in self.base_lrs) or 1.0
        # The least rates of groups have the same ratios as their rates.
        least = [self.min_lr * float(rate) / highest for rate in self.base_lrs]
        return [low + (float(rate) - low) * weight for low, rate in zip(least, self.base_lrs, strict=True)]
