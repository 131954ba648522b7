"""HOW an address becomes a kernel."""

from nernlit.predictors.base import Predictor
from nernlit.predictors.encoding import FourierEncoding
from nernlit.predictors.ensemble import PredictorEnsemble
from nernlit.predictors.mlp import MLP

__all__ = ["MLP", "FourierEncoding", "Predictor", "PredictorEnsemble"]
