"""State dicts: weights under several names (modules used twice, tied parameters), and the versions of modules."""

from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy


def names_of_weights(net: nn.Module) -> dict[str, tuple[str, ...]]:
    """Every key of a network's state dict -> all keys of the same weight, in the state dict's order.

    Two tensors are the same weight if they are the same memory in the same shape. Tensors that only overlap, such as a
    weight and its transposed view, are two weights; see `overlap`.

    >>> shared = nn.Linear(1, 1, bias=False)
    >>> names_of_weights(nn.Sequential(shared, shared))
    {'0.weight': ('0.weight', '1.weight'), '1.weight': ('0.weight', '1.weight')}
    """
    groups: dict[object, list[str]] = defaultdict(list)
    for key, value in net.state_dict(keep_vars=True).items():
        if isinstance(value, Tensor):
            in_memory = _in_memory(value) and value.numel()
            groups[_memory(value) if in_memory else id(value)].append(key)
    return {key: tuple(group) for group in groups.values() for key in group}


def places_of_weights(net: nn.Module) -> dict[str, tuple[str, ...]]:
    """Every key of a network's state dict -> the keys by which `functional_call` must be given that weight.

    One key per module that holds the weight, even if the module has several names: if `functional_call` is given two
    names of one module, it restores the replacement instead of the module's own weight.
    """
    places: dict[str, tuple[str, ...]] = {}
    for key, names in names_of_weights(net).items():
        holders: dict[tuple[int, str], str] = {}
        for name in names:
            path, _, attribute = name.rpartition(".")
            holders.setdefault((id(net.get_submodule(path)), attribute), name)
        places[key] = tuple(holders.values())
    return places


def overlap(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors may share elements: their ranges in memory overlap."""
    if not (_in_memory(one) and _in_memory(other)) or one.untyped_storage().data_ptr() == 0:
        return False
    start, stop = _range(one)
    other_start, other_stop = _range(other)
    same_storage = one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
    return same_storage and start < other_stop and other_start < stop


def unnamed_tensors(net: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Tensors that a network's modules hold and its state dict does not: attributes, containers, temporary buffers.

    A call with other weights cannot replace them there.
    """
    saved = net.state_dict()
    for name, module in net.named_modules():
        held = {key: value for key, value in vars(module).items() if key not in ("_parameters", "_buffers", "_modules")}
        buffers = module.named_buffers(recurse=False)
        held |= {key: value for key, value in buffers if f"{name}.{key}".removeprefix(".") not in saved}
        for key, value in held.items():
            items = list(value.values()) if isinstance(value, dict) else value
            for item in items if isinstance(items, list | tuple | set) else [items]:
                if isinstance(item, Tensor):
                    yield f"{name}.{key}".removeprefix("."), item


def with_versions(state: Mapping[str, Tensor], source: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """A state dict with the versions of the modules that another one has.

    `load_state_dict` takes weights without versions for those of the oldest version, and some modules convert these.

    Args:
        state: Tensors by name.
        source: A state dict; if it has no versions, neither has the result.
        prefix: What its names have before those of `state`.
    """
    found = OrderedDict(state)
    versions = getattr(source, "_metadata", None)
    if versions is not None:
        dotted = {f"{name}." if name else "": version for name, version in versions.items()}
        found._metadata = OrderedDict(  # type: ignore[attr-defined]  # where torch keeps them
            (name.removeprefix(prefix).removesuffix("."), version)
            for name, version in dotted.items()
            if name.startswith(prefix)
        )
    return found


def _in_memory(tensor: Tensor) -> bool:
    return not is_lazy(tensor) and tensor.layout == torch.strided and tensor.device.type != "meta"


def _memory(tensor: Tensor) -> object:
    return tensor.untyped_storage().data_ptr(), _range(tensor), tuple(tensor.shape), tensor.stride(), tensor.dtype


def _range(tensor: Tensor) -> tuple[int, int]:
    """The first element in the storage, and the one after the last."""
    if not tensor.numel():
        return 0, 0
    last: int = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = int(tensor.storage_offset())
    return start, start + last + 1
