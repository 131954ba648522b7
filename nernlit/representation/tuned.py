"""Tensors of the network that are not predicted, but trained."""

from collections.abc import Mapping
from typing import Literal, final

from torch import Tensor, nn

from nernlit.errors import UsageError, require_one_of
from nernlit.kernels import Layout

#: Ratio of the learning rate of these tensors to that of the predictor.
TUNED_RATE = 0.1

TuneKept = Literal["none", "affine", "all"]


@final
class Tuned(nn.Module):
    """Trained copies of some of a network's parameters.

    Args:
        values: State-dict key -> start value.
    """

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.keys = tuple(values)
        # Names of parameters cannot contain dots.
        self.values = nn.ParameterList(nn.Parameter(value.detach().clone()) for value in values.values())

    def named(self) -> dict[str, Tensor]:
        """State-dict key -> value."""
        return dict(zip(self.keys, self.values, strict=True))


def tuned(net: nn.Module, layout: Layout, which: TuneKept) -> Tuned:
    """The kept tensors to train.

    Args:
        net: The network.
        layout: Its predicted weights.
        which: `none`, `affine` (parameters with one dimension) or `all`.

    Raises:
        UsageError: If it is none of these, or a module caches what it computes from such a tensor.
    """
    require_one_of(TuneKept, tune_kept=which)
    if which == "none":
        return Tuned({})
    predicted = {key for layer in layout.layers for key in (layer.key, *layer.aliases)}
    values = {
        key: value
        for key, value in net.named_parameters()
        if key not in predicted and (which == "all" or value.dim() == 1)
    }
    for key in values:
        module = net.get_submodule(key.rpartition(".")[0])
        if caches := [name for name, value in vars(module).items() if name.endswith("cache") and value is not None]:
            raise UsageError(
                f"tune_kept={which}: {type(module).__name__} caches what it computes from {key} ({caches[0]}), so a "
                "trained value would have no effect; pass another tune_kept (none, or affine for vectors only)."
            )
    return Tuned(values)
