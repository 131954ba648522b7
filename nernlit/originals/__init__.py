"""Originals: the CNNs that are represented. Any timm model, including the CIFAR ResNets registered here."""

from nernlit.originals.batch_norm import BATCH_NORMS, with_statistics, without_statistics
from nernlit.originals.checks import mask_names, require_classifier, require_pixels, require_plain_weights
from nernlit.originals.cifar_resnet import CifarResNet
from nernlit.originals.folding import Folded
from nernlit.originals.kronecker import Factors, kronecker_factors
from nernlit.originals.original import Original
from nernlit.originals.sensitivity import activation_moments, batch_norm_moments, fisher_information
from nernlit.originals.stored import decoded_original, description, fitted_original
from nernlit.originals.taps import NERN_TAPS, FeatureTaps
from nernlit.storage.weights import load_strictly, read_state_dict

__all__ = [
    "BATCH_NORMS",
    "NERN_TAPS",
    "CifarResNet",
    "Factors",
    "FeatureTaps",
    "Folded",
    "Original",
    "activation_moments",
    "batch_norm_moments",
    "decoded_original",
    "description",
    "fisher_information",
    "fitted_original",
    "kronecker_factors",
    "load_strictly",
    "mask_names",
    "read_state_dict",
    "require_classifier",
    "require_pixels",
    "require_plain_weights",
    "with_statistics",
    "without_statistics",
]
