"""The LightningDataModules."""

from nernlit.data.base import ImageDataModule
from nernlit.data.cifar import CIFAR10DataModule, CIFAR100DataModule
from nernlit.data.digits import DigitsDataModule
from nernlit.data.folder import FolderDataModule
from nernlit.data.stl import STL10DataModule

__all__ = [
    "CIFAR10DataModule",
    "CIFAR100DataModule",
    "DigitsDataModule",
    "FolderDataModule",
    "ImageDataModule",
    "STL10DataModule",
]
