"""Training: objectives, stages, the schemes that list them, and the module that trains an original."""

from nernlit.training.baseline_joint import BaselineJoint
from nernlit.training.class_names import take_class_names
from nernlit.training.classifier import ClassifierModule
from nernlit.training.compression import compress
from nernlit.training.decoupled_distill import DecoupledDistill, ReconstructionPhase
from nernlit.training.distillation import Distillation
from nernlit.training.objectives import Objective, Reconstruction, Step
from nernlit.training.optimization import refuse_averaging
from nernlit.training.original import OriginalModule
from nernlit.training.plan import Plan
from nernlit.training.progressive import Progressive, Round
from nernlit.training.rate import Rate
from nernlit.training.recon_only import ReconOnly
from nernlit.training.scheme import Scheme
from nernlit.training.sensitivity import Sensitivity
from nernlit.training.stages import Stage
from nernlit.training.strategies import refuse_sessions, refuse_sharded_strategies

__all__ = [
    "BaselineJoint",
    "ClassifierModule",
    "DecoupledDistill",
    "Distillation",
    "Objective",
    "OriginalModule",
    "Plan",
    "Progressive",
    "Rate",
    "ReconOnly",
    "Reconstruction",
    "ReconstructionPhase",
    "Round",
    "Scheme",
    "Sensitivity",
    "Stage",
    "Step",
    "compress",
    "refuse_averaging",
    "refuse_sessions",
    "refuse_sharded_strategies",
    "take_class_names",
]
