"""nernlit: a trained CNN stored as a small coordinate network.

An original CNN's kernels have addresses; a predictor maps addresses to kernels; a scheme decides what the predictor is
trained on; Lightning runs it.

>>> representation = Representation(Original("digits_resnet8", pretrained=True), MLP(hidden=64))
>>> representation(torch.rand(2, 1, 8, 8)).shape
torch.Size([2, 10])
"""

from nernlit.kernels import LayerFilter, Layout
from nernlit.originals import Original
from nernlit.predictors import MLP, FourierEncoding, Predictor
from nernlit.representation import Representation, Sizes

__all__ = ["MLP", "FourierEncoding", "LayerFilter", "Layout", "Original", "Predictor", "Representation", "Sizes"]
__version__ = "0.1.0"
