"""What torch and timm lack, or lack in YAML: schedules and optimisers that learn the run's length."""

from nernlit.optimisers.ranger import Ranger
from nernlit.optimisers.schedule import WarmupCosine
from nernlit.optimisers.steps import NeedsTotalSteps

__all__ = ["NeedsTotalSteps", "Ranger", "WarmupCosine"]
