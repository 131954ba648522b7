"""Addresses: the predictor's inputs (layer, filter, channel), one row per kernel.

The original's weights are never moved. An order only changes the address of a kernel: its position in the order
replaces its index in the weight, so that neighboring addresses hold similar kernels.
"""

import contextlib
import hashlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from platformdirs import user_cache_path
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from nernlit.errors import LayoutError, StorageError, require_one_of
from nernlit.kernels.layout import Layout
from nernlit.kernels.orders import OrderName, positions
from nernlit.storage.files import write_atomically
from nernlit.utilities.progress import progress

_CACHED_FROM = 100_000  # kernels; smaller networks are not cached: their orders take a second or two
_CACHE_VERSION = "1"  # increase it when the algorithm gives different orders


def addresses(layout: Layout, state: Mapping[str, Tensor], order: OrderName) -> Tensor:
    """The address of every kernel, (N, 3) int64: layer number, filter position, channel position.

    Orders of large networks are cached in the user's cache folder; the file name is a hash of the weights.

    Args:
        layout: The predicted kernels and their rows in the table.
        state: The original's state dict; the order is computed from its weights.
        order: `none` (raw indices), `in_filter` or `cross_filter`.

    Raises:
        UsageError: If `order` is none of these.
        LayoutError: If a weight is not finite.

    >>> layout = Layout([("w", (2, 2, 1, 1))])
    >>> addresses(layout, {"w": torch.ones(2, 2, 1, 1)}, "none").tolist()
    [[0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 1]]
    """
    require_one_of(OrderName, order=order)
    weights = [state[layer.key].detach().cpu() for layer in layout.layers]
    for layer, weight in zip(layout.layers, weights, strict=True):
        if not bool(weight.isfinite().all()):
            raise LayoutError(
                f"{int((~weight.isfinite()).sum())} of the {weight.numel()} values of the original's {layer.key!r} are "
                "not finite; expected finite numbers. Pass the weights of a training run that did not diverge."
            )
    weights = [layer.blocks(weight) for layer, weight in zip(layout.layers, weights, strict=True)]
    if order == "none" or layout.num_kernels < _CACHED_FROM:
        return _computed(weights, order)
    file = _cache_file(weights, order)
    with contextlib.suppress(OSError, SafetensorError, KeyError):
        cached_N3 = load(file.read_bytes())["addresses"]
        if are_addresses(layout, cached_N3):
            return cached_N3.long()
    table_N3 = _computed(weights, order)
    with contextlib.suppress(StorageError):  # without a writable cache folder the order is computed again next time
        write_atomically(file, save({"addresses": table_N3.int()}))
    return table_N3


def are_addresses(layout: Layout, table_N3: Tensor) -> bool:
    """Whether `table_N3` holds valid addresses: those of each layer are a permutation of its (filter, channel) grid.

    >>> layout = Layout([("w", (1, 2, 1, 1))])
    >>> [are_addresses(layout, torch.tensor([[0, 0, a], [0, 0, b]])) for a, b in ((1, 0), (1, 1), (1, 2))]
    [True, False, False]
    """
    if table_N3.shape != (layout.num_kernels, 3) or table_N3.is_floating_point() or table_N3.is_complex():
        return False
    for number, layer in enumerate(layout.layers):
        filters, channels = layer.grid
        own = table_N3[layer.rows].long()
        low, high = torch.tensor([number, 0, 0]), torch.tensor([number + 1, filters, channels])
        if not bool(((own >= low) & (own < high)).all()):
            return False
        taken = torch.zeros(layer.kernels, dtype=torch.bool)
        taken[own[:, 1] * channels + own[:, 2]] = True
        if not bool(taken.all()):
            return False
    return True


def _cache_file(weights: Sequence[Tensor], order: OrderName) -> Path:
    content = hashlib.sha256(f"{order} {_CACHE_VERSION} {[tuple(weight.shape) for weight in weights]}".encode())
    for weight in weights:
        content.update(weight.float().contiguous().numpy().data)
    return user_cache_path("nernlit") / "orders" / f"{content.hexdigest()}.safetensors"


def _computed(weights: Sequence[Tensor], order: OrderName) -> Tensor:
    kernels = sum(weight[:, :, 0, 0].numel() for weight in weights)
    with (
        progress(f"{order} order of {kernels:,} kernels", kernels) as advance,
        ThreadPoolExecutor(torch.get_num_threads()) as threads,
    ):

        def rows(number: int) -> Tensor:
            weight = weights[number]
            places_OI2 = positions(weight, order)
            advance(places_OI2.shape[:2].numel())
            return torch.cat([torch.full((len(places_OI2.flatten(0, 1)), 1), number), places_OI2.flatten(0, 1)], dim=1)

        # The largest layer first: otherwise the other threads would wait for it at the end.
        largest_first = sorted(range(len(weights)), key=lambda number: -weights[number].numel())
        done = dict(zip(largest_first, threads.map(rows, largest_first), strict=True))
    return torch.cat([done[number] for number in range(len(weights))])
