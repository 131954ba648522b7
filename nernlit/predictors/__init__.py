"""HOW an address becomes a kernel."""

from nernlit.predictors.base import Predictor
from nernlit.predictors.encoding import FourierEncoding
from nernlit.predictors.mlp import MLP
from nernlit.predictors.trials import Trials

__all__ = ["MLP", "FourierEncoding", "Predictor", "Trials"]
