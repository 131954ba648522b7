"""The LightningDataModules."""

from nernlit.data.base import ImageDataModule, Split
from nernlit.data.cifar import CIFAR10DataModule, CIFAR100DataModule
from nernlit.data.digits import DigitsDataModule
from nernlit.data.eval_sets import Corrupted, EvalSet
from nernlit.data.folder import FolderDataModule, ImageNetDataModule
from nernlit.data.nothing import NoImages
from nernlit.data.ood import CIFAR10C, CIFAR100C, ImageNetR
from nernlit.data.sources import ImageSource, TensorImages
from nernlit.data.stl import STL10DataModule

__all__ = [
    "CIFAR10C",
    "CIFAR100C",
    "CIFAR10DataModule",
    "CIFAR100DataModule",
    "Corrupted",
    "DigitsDataModule",
    "EvalSet",
    "FolderDataModule",
    "ImageDataModule",
    "ImageNetDataModule",
    "ImageNetR",
    "ImageSource",
    "NoImages",
    "STL10DataModule",
    "Split",
    "TensorImages",
]
