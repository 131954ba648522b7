"""What torch and timm lack, or lack in YAML: schedules and optimizers that learn the run's length."""

from nernlit.optimizers.ranger import Ranger
from nernlit.optimizers.schedule import WarmupCosine
from nernlit.optimizers.steps import NeedsTotalSteps

__all__ = ["NeedsTotalSteps", "Ranger", "WarmupCosine"]
