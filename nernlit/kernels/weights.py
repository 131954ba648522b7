"""The weights of a network that can be predicted."""

from collections.abc import Collection, Iterator, Sequence

from torch import nn

from nernlit.errors import LayoutError
from nernlit.kernels.blocks import layer_name
from nernlit.kernels.layers import Candidate, LayerType
from nernlit.utilities.sharing import names_of_weights, overlap, unnamed_tensors

_CONVOLUTIONS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
_IN_ATTENTION = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


def candidates(net: nn.Module, types: Collection[LayerType]) -> dict[str, Candidate]:
    """The weights of a network's layers of these types, in module order: state-dict key -> weight.

    Weights that are computed from other tensors are included; see `require_replaceable`.
    """
    names = names_of_weights(net)
    found: dict[str, Candidate] = {}
    for module_name, module in net.named_modules(remove_duplicate=False):
        for attribute, kind in _weights(module):
            if kind not in types:
                continue
            key = f"{module_name}.{attribute}".removeprefix(".")
            shape = tuple(getattr(module, attribute).shape)
            found.setdefault(names.get(key, (key,))[0], Candidate(shape, kind)).names.append(layer_name(key))
    return found


def _weights(module: nn.Module) -> Iterator[tuple[str, LayerType]]:
    """The attributes of a module that are weights, and the type of layer that each belongs to."""
    if isinstance(module, _CONVOLUTIONS):
        yield "weight", "conv"
    elif isinstance(module, nn.Linear):
        yield "weight", "linear"
    elif isinstance(module, nn.MultiheadAttention):
        yield from ((name, "linear") for name in _IN_ATTENTION if getattr(module, name) is not None)


def require_replaceable(net: nn.Module, keys: Sequence[str]) -> None:
    """Check that the weights of these keys are in a network's state dict and share memory with no other tensor.

    Raises:
        LayoutError: If a weight is computed from other tensors, or shares memory with one.
    """
    state, names = net.state_dict(keep_vars=True), names_of_weights(net)
    unnamed = list(unnamed_tensors(net))
    for key in keys:
        if key not in names:
            raise LayoutError(
                f"the weight of {layer_name(key)!r} is not in the state dict: it is computed from other tensors "
                "(weight_norm, spectral_norm, pruning); make it permanent first, for example with "
                "torch.nn.utils.parametrize.remove_parametrizations, or exclude the layer "
                "(--model.representation.layers)."
            )
        views = [k for k, v in state.items() if k not in names[key] and k in names and overlap(state[key], v)]
        if views:
            raise LayoutError(
                f"{key!r} shares memory with {views[0]!r}, which is another view of it, so it cannot be predicted "
                "while the other tensor is kept. Copy one of the two tensors (`.clone()`), or exclude the layer "
                "(--model.representation.layers)."
            )
        held = [name for name, value in unnamed if overlap(state[key], value)]
        if held:
            raise LayoutError(
                f"{held[0]!r} refers to the weight {key!r} without being a parameter, so a predicted weight would "
                "not replace it there. Read the weight from its module where it is used, or exclude the layer "
                "(--model.representation.layers)."
            )
