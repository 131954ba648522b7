"""Networks that a module uses and does not own: they stay out of its checkpoints."""

from typing import Any

from torch import nn


def leave_out_of_checkpoints(owner: nn.Module, child: str) -> None:
    """Keep the submodule `child` out of the owner's `state_dict`, and do not ask for it when one is loaded."""

    def leave_out(module: nn.Module, state: dict[str, Any], prefix: str, _metadata: dict[str, Any]) -> None:
        for key in [key for key in state if key.startswith(f"{prefix}{child}.")]:
            del state[key]

    def put_in(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        state.update(module.get_submodule(child).state_dict(prefix=f"{prefix}{child}."))

    owner.register_state_dict_post_hook(leave_out)
    owner.register_load_state_dict_pre_hook(put_in)
