"""Lightning callbacks. They decide when to compute and log; `nernlit.analysis` has the computations."""

from nernlit.callbacks.attacks import AdversarialAccuracy
from nernlit.callbacks.best import BestCheckpoint
from nernlit.callbacks.checkpoint_io import DurableCheckpointIO
from nernlit.callbacks.compiled import Compile
from nernlit.callbacks.figures import RepresentationFigures
from nernlit.callbacks.interruption import Interruption
from nernlit.callbacks.last import LastCheckpoint
from nernlit.callbacks.layers import LayerDifference, LowFrequencyEnergy
from nernlit.callbacks.learning_rate import LearningRate
from nernlit.callbacks.log_lines import ValidationLog
from nernlit.callbacks.progress import ProgressLine
from nernlit.callbacks.rounds import RoundCheckpoint
from nernlit.callbacks.summary import Summary
from nernlit.callbacks.threads import CpuThreads
from nernlit.callbacks.throughput import Throughput
from nernlit.callbacks.writer import WeightsWriter

__all__ = [
    "AdversarialAccuracy",
    "BestCheckpoint",
    "Compile",
    "CpuThreads",
    "DurableCheckpointIO",
    "Interruption",
    "LastCheckpoint",
    "LayerDifference",
    "LearningRate",
    "LowFrequencyEnergy",
    "ProgressLine",
    "RepresentationFigures",
    "RoundCheckpoint",
    "Summary",
    "Throughput",
    "ValidationLog",
    "WeightsWriter",
]
