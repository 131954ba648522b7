"""The modes of the caller that would change how files are written and read."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def plain_modes() -> Iterator[None]:
    """Inside, there is neither inference mode nor autocast, and the default type is float32.

    So files and weights are the same whatever the caller has set, and tensors that are made inside can be trained. It
    can also decorate a function.
    """
    accelerator = torch.accelerator.current_accelerator()
    default = torch.get_default_dtype()
    with ExitStack() as modes:
        modes.enter_context(torch.inference_mode(False))
        for kind in ("cpu", *([] if accelerator is None else [accelerator.type])):
            modes.enter_context(torch.autocast(kind, enabled=False))
        torch.set_default_dtype(torch.float32)
        modes.callback(torch.set_default_dtype, default)
        yield
