"""The .nern file format, and the computation of weights from a predictor."""

from nernlit.coding.checks import Checks
from nernlit.coding.described import predictor_classes
from nernlit.coding.kept import KeptForm, largest_change
from nernlit.coding.nern import NernFile, is_nern, part_bytes, unreadable
from nernlit.coding.prediction import bind, predicted_kernels, predicted_weights, require_kernel_size
from nernlit.coding.zeros import with_zeros

__all__ = [
    "Checks",
    "KeptForm",
    "NernFile",
    "bind",
    "is_nern",
    "largest_change",
    "part_bytes",
    "predicted_kernels",
    "predicted_weights",
    "predictor_classes",
    "require_kernel_size",
    "unreadable",
    "with_zeros",
]
