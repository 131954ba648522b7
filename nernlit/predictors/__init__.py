"""Predictors: networks that map kernel addresses to kernels."""

from nernlit.predictors.base import Predictor
from nernlit.predictors.codebooks import Codebooks
from nernlit.predictors.encoding import FourierEncoding
from nernlit.predictors.ensemble import PredictorEnsemble
from nernlit.predictors.mlp import MLP
from nernlit.predictors.quantized import MOST_BITS, Quantize, Quantized
from nernlit.predictors.table import Table

__all__ = [
    "MLP",
    "MOST_BITS",
    "Codebooks",
    "FourierEncoding",
    "Predictor",
    "PredictorEnsemble",
    "Quantize",
    "Quantized",
    "Table",
]
