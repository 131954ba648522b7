"""nernlit: a trained CNN stored as a small coordinate network.

An original CNN's kernels have addresses; a predictor maps addresses to kernels; a scheme decides what the predictor is
trained on; Lightning runs it.

>>> import torch
>>> from nernlit import MLP, Original, Representation
>>> representation = Representation(Original("digits_resnet8", pretrained=True), MLP(hidden=64))
>>> representation(torch.rand(2, 1, 8, 8)).shape
torch.Size([2, 10])
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nernlit.data import ImageDataModule, NoImages
    from nernlit.kernels import LayerFilter, Layout
    from nernlit.originals import Original
    from nernlit.predictors import MLP, Codebooks, FourierEncoding, Predictor, Quantize, Quantized, Table
    from nernlit.representation import Representation, Sizes, calibrate, load
    from nernlit.training import (
        BaselineJoint,
        DecoupledDistill,
        Distillation,
        Objective,
        OriginalModule,
        Progressive,
        Rate,
        ReconOnly,
        Reconstruction,
        ReconstructionPhase,
        Scheme,
        Sensitivity,
        Stage,
        Step,
        compress,
    )

__all__ = [
    "MLP",
    "BaselineJoint",
    "Codebooks",
    "DecoupledDistill",
    "Distillation",
    "FourierEncoding",
    "ImageDataModule",
    "LayerFilter",
    "Layout",
    "NoImages",
    "Objective",
    "Original",
    "OriginalModule",
    "Predictor",
    "Progressive",
    "Quantize",
    "Quantized",
    "Rate",
    "ReconOnly",
    "Reconstruction",
    "ReconstructionPhase",
    "Representation",
    "Scheme",
    "Sensitivity",
    "Sizes",
    "Stage",
    "Step",
    "Table",
    "calibrate",
    "compress",
    "load",
]
__version__ = "0.1.0"  # the only place that states it: pyproject.toml reads it from here

_NAMES = {
    "data": ["ImageDataModule", "NoImages"],
    "kernels": ["LayerFilter", "Layout"],
    "training": [
        "BaselineJoint",
        "DecoupledDistill",
        "Distillation",
        "Objective",
        "OriginalModule",
        "Progressive",
        "Rate",
        "ReconOnly",
        "Reconstruction",
        "ReconstructionPhase",
        "Scheme",
        "Sensitivity",
        "Stage",
        "Step",
        "compress",
    ],
    "originals": ["Original"],
    "predictors": ["MLP", "Codebooks", "FourierEncoding", "Predictor", "Quantize", "Quantized", "Table"],
    "representation": ["Representation", "Sizes", "calibrate", "load"],
}
_MODULES = [*_NAMES, "analysis", "callbacks", "errors", "losses", "optimizers", "storage", "utilities"]
_MODULE_OF = {name: part for part, names in _NAMES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import on first access (PEP 562), so that `import nernlit` alone does not import PyTorch."""
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*__all__, *_MODULES])
