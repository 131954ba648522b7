"""Finds a network's weights among the tensors of a file: their key, prefix, and whether they are averaged or raw."""

import logging
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nernlit.errors import CheckpointError
from nernlit.utilities.sharing import with_versions
from nernlit.utilities.text import abbreviated

#: Keys under which trainers store a network's weights, in timm's order of preference.
_USUAL = ("state_dict_ema", "model_ema", "state_dict", "model", "model_state_dict")
#: Prefixes that wrappers and Lightning modules put before the names.
_PREFIXES = ("module.", "model.", "_orig_mod.", "original.", "net.")
_EMA = re.compile(r"(^|[._])ema($|[._])", re.IGNORECASE)
_DEPTH = 5

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class WeightSet:
    """Tensors of a file under the same key whose names have the same prefix.

    Attributes:
        nest: The keys of the nested dictionaries that contain them, joined by dots; empty at the top level.
        prefix: The common prefix of their names.
        state: The tensors by name, without the prefix.
    """

    nest: str
    prefix: str
    state: dict[str, Tensor]

    @property
    def is_ema(self) -> bool:
        """Whether they are an exponential moving average, by their names."""
        return bool(_EMA.search(self.nest) or _EMA.search(self.prefix))

    @property
    def rank(self) -> tuple[int, bool]:
        """Usual keys come before others, names without a prefix before those with one."""
        return (_USUAL.index(self.nest) if self.nest in _USUAL else len(_USUAL)), bool(self.prefix)

    def __str__(self) -> str:
        return "/".join(filter(None, (self.nest, self.prefix and f"{self.prefix}*"))) or "the top level"


def network_weights(
    content: Any, source: str, own: Mapping[str, Tensor] | None, ema: bool | None = None
) -> dict[str, Tensor]:
    """The tensors in a file that are a network's.

    Args:
        content: The content of the file.
        source: The file's name, for messages.
        own: The network's state dict; without it the file's largest set is selected.
        ema: Select the moving average (True) or the raw weights (False); by default the average, if there is one.

    Raises:
        CheckpointError: If there is no named tensor, several sets fit equally well, the averaged weights do not fit
            (unless `ema` is False), or `ema` asks for a set that is not there.
    """
    found = list(_sets(content, own))
    if not found:
        raise CheckpointError(
            f"{source} holds no named tensors; expected a state dict, bare or under {', '.join(_USUAL[2:])}."
        )
    if own is None:
        return min(found, key=lambda each: (each.rank, -len(each.state))).state
    closeness = {id(each): _matches(own, each.state) for each in found}
    fitting = [each for each in found if not mismatches(own, each.state)]
    averages = [each for each in found if each.is_ema and any(closeness[id(each)])]
    if ema is not False and averages and not any(each.is_ema for each in fitting):
        closest = max(averages, key=lambda each: closeness[id(each)])
        raise CheckpointError(
            f"the averaged (EMA) weights in {source} ({closest}) do not fit: "
            f"{'; '.join(mismatches(own, closest.state))}. Pass ema: false to take the raw ones."
        )
    if ema is not None and not any(each.is_ema == ema for each in fitting or found):
        here, wanted = ("raw", "averaged (EMA)") if ema else ("averaged (EMA)", "raw")
        raise CheckpointError(
            f"ema: {str(ema).lower()} is given, but {source} holds no {wanted} weights, only {here} ones; "
            "leave ema out."
        )
    if not fitting:
        wanted_sets = [each for each in found if not (ema is False and each.is_ema)]
        return max(wanted_sets, key=lambda each: closeness[id(each)]).state
    return _preferred(fitting, source, ema).state


def _sets(content: Any, own: Mapping[str, Tensor] | None, nest: str = "", depth: int = 0) -> Iterator[WeightSet]:
    if not isinstance(content, Mapping) or depth > _DEPTH:
        return
    named = {key: value for key, value in content.items() if isinstance(key, str)}
    tensors = {key: value for key, value in named.items() if isinstance(value, Tensor)}
    if tensors:
        for prefix in _prefixes(tensors, own):
            state = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            yield WeightSet(nest, prefix, with_versions(state, content, prefix))
    for key, value in named.items():
        yield from _sets(value, own, f"{nest}.{key}".lstrip("."), depth + 1)


def _prefixes(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor] | None) -> list[str]:
    """What stands before the network's names; without a network, the wrappers that all of the tensors have."""
    if own is not None:
        counts = Counter(
            key[:start]
            for key in tensors
            for start in (0, *(match.end() for match in re.finditer(r"\.", key)))
            if key[start:] in own
        )
        return list(counts) or [""]
    prefix = ""
    while wrapper := next((p for p in _PREFIXES if all(key.startswith(prefix + p) for key in tensors)), ""):
        prefix += wrapper
    return [prefix]


def _preferred(fitting: Sequence[WeightSet], source: str, ema: bool | None) -> WeightSet:
    """The set to load of those that fit; says so where there are others."""
    averages = [each for each in fitting if each.is_ema]
    candidates = [each for each in fitting if not each.is_ema] if ema is False or not averages else averages
    chosen = min(candidates, key=lambda each: each.rank)
    others = [each for each in fitting if not _same(each.state, chosen.state)]
    if equals := [each for each in others if each in candidates and each.rank == chosen.rank]:
        raise CheckpointError(
            f"{source} holds several sets of weights that fit ({', '.join(map(str, [chosen, *equals]))}); "
            "save the one that you mean as a file of its own."
        )
    if others and _is_rank_zero():
        kind = "averaged (EMA) ones" if chosen.is_ema else "ones"
        hint = ", as timm does; pass ema: false for the raw ones" if chosen.is_ema and ema is None else ""
        left_out = ", ".join(map(str, others))
        _logger.warning(
            "%s holds %d sets of weights: took the %s in %s, not those in %s%s.",
            *(source, len(others) + 1, kind, chosen, left_out, hint),
        )
    return chosen


def mismatches(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> list[str]:
    """The differences between a state dict and a network's; only BatchNorm's step counters may be absent."""
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in state if key not in own]
    shaped = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    return [
        f"{len(keys)} {kind} ({abbreviated(keys, 3)})"
        for kind, keys in (("missing", missing), ("unexpected", unexpected), ("wrongly shaped", shaped))
        if keys
    ]


def _matches(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> tuple[int, int]:
    """How many of a network's tensors there are with the right shape, and with any."""
    shared = own.keys() & state.keys()
    return sum(own[key].shape == state[key].shape for key in shared), len(shared)


def _same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one is other or (one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one))


def _equal(one: Tensor, other: Tensor) -> bool:
    comparable = one.dtype == other.dtype and one.layout == other.layout == torch.strided and not one.is_meta
    return one is other or (comparable and torch.equal(one, other))


def _is_rank_zero() -> bool:
    """Whether this is the first of a run's processes, as launchers say before there is a process group."""
    ranks = (os.environ.get(name) for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"))
    return next((rank for rank in ranks if rank), "0") == "0"
