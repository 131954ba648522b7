"""Predictors: networks that map kernel addresses to kernels."""

from nernlit.predictors.base import Predictor
from nernlit.predictors.codebooks import Codebooks
from nernlit.predictors.encoding import FourierEncoding
from nernlit.predictors.ensemble import PredictorEnsemble
from nernlit.predictors.mlp import MLP
from nernlit.predictors.quantized import MAX_BITS, Quantize, Quantized
from nernlit.predictors.table import Table

__all__ = [
    "MAX_BITS",
    "MLP",
    "Codebooks",
    "FourierEncoding",
    "Predictor",
    "PredictorEnsemble",
    "Quantize",
    "Quantized",
    "Table",
]
