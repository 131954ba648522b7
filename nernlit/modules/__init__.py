"""The LightningModules: one a scheme, and one that trains an original."""

from nernlit.modules.base import ReconstructionModule
from nernlit.modules.classifier import ClassifierModule
from nernlit.modules.original import OriginalModule
from nernlit.modules.recon_only import ReconOnly

__all__ = ["ClassifierModule", "OriginalModule", "ReconOnly", "ReconstructionModule"]
