"""Optimizers and schedules that torch and timm do not have, or that need to know the length of the run."""

from nernlit.optimizers.ranger import Ranger
from nernlit.optimizers.schedule import WarmupCosine
from nernlit.optimizers.steps import NeedsTotalSteps

__all__ = ["NeedsTotalSteps", "Ranger", "WarmupCosine"]
