"""The representation: an original whose weights are computed by a predictor; its specification, saving and loading."""

from nernlit.representation.calibration import calibrate
from nernlit.representation.fitting import without_fitting
from nernlit.representation.loading import load, load_representation
from nernlit.representation.onnx import write_onnx
from nernlit.representation.representation import Representation
from nernlit.representation.sizes import Sizes

__all__ = [
    "Representation",
    "Sizes",
    "calibrate",
    "load",
    "load_representation",
    "without_fitting",
    "write_onnx",
]
