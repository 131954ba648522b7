"""The LightningModules: one a scheme, and one that trains an original."""

from nernlit.training.base import ReconstructionModule
from nernlit.training.baseline_joint import BaselineJoint
from nernlit.training.classifier import ClassifierModule
from nernlit.training.decoupled_distill import DecoupledDistill
from nernlit.training.original import OriginalModule
from nernlit.training.plan import Plan
from nernlit.training.progressive import Progressive, Round
from nernlit.training.recon_only import ReconOnly

__all__ = [
    "BaselineJoint",
    "ClassifierModule",
    "DecoupledDistill",
    "OriginalModule",
    "Plan",
    "Progressive",
    "ReconOnly",
    "ReconstructionModule",
    "Round",
]
