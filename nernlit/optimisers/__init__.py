"""What torch and timm lack, or lack in YAML: schedules and optimisers that learn the run's length."""

from nernlit.optimisers.named import timm_optimizer
from nernlit.optimisers.schedule import WarmupCosine
from nernlit.optimisers.steps import NeedsTotalSteps

__all__ = ["NeedsTotalSteps", "WarmupCosine", "timm_optimizer"]
