"""The LightningModules: one a scheme, and one that trains an original."""

from nernlit.modules.base import ReconstructionModule
from nernlit.modules.baseline_joint import BaselineJoint
from nernlit.modules.classifier import ClassifierModule
from nernlit.modules.decoupled_distill import DecoupledDistill
from nernlit.modules.original import OriginalModule
from nernlit.modules.plan import Plan
from nernlit.modules.progressive import Progressive, Round
from nernlit.modules.recon_only import ReconOnly

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
