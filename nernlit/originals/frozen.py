"""Networks that a module uses and does not own: they stay out of its checkpoints."""

from functools import partial
from typing import Any

from torch import nn


def leave_out_of_checkpoints(owner: nn.Module, child: str) -> None:
    """Keep the submodule `child` out of the owner's `state_dict`, and do not ask for it when one is loaded."""
    # Partials and not closures: processes that are spawned get the module pickled.
    owner.register_state_dict_post_hook(partial(_leave_out, child))
    owner.register_load_state_dict_pre_hook(partial(_put_in, child))


def _leave_out(child: str, module: nn.Module, state: dict[str, Any], prefix: str, _metadata: dict[str, Any]) -> None:
    for key in [key for key in state if key.startswith(f"{prefix}{child}.")]:
        del state[key]


def _put_in(child: str, module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    state.update(module.get_submodule(child).state_dict(prefix=f"{prefix}{child}."))
