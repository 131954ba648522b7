"""When to compute and log; the maths is in analysis/."""

from nernlit.callbacks.best import BestCheckpoint
from nernlit.callbacks.figures import RepresentationFigures
from nernlit.callbacks.rounds import RoundCheckpoint
from nernlit.callbacks.summary import Summary
from nernlit.callbacks.writer import WeightsWriter

__all__ = ["BestCheckpoint", "RepresentationFigures", "RoundCheckpoint", "Summary", "WeightsWriter"]
