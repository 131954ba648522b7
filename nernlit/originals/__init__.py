"""The CNNs that are represented: any timm model, our CIFAR ResNets among them."""

from nernlit.originals.checkpoint import load_strictly, read_state_dict
from nernlit.originals.cifar_resnet import CifarResNet
from nernlit.originals.original import Original, fingerprint

__all__ = ["CifarResNet", "Original", "fingerprint", "load_strictly", "read_state_dict"]
