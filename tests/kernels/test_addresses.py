import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from nernlit.kernels import Layout, addresses

MODULE = sys.modules["nernlit.kernels.addresses"]  # the package's attribute of this name is the function


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(MODULE, "user_cache_path", lambda name: tmp_path / name)
    monkeypatch.setattr(MODULE, "_CACHED_FROM", 1)
    return tmp_path / "nernlit" / "orders"


def _network(seed: int = 0) -> tuple[Layout, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    state = {"a": torch.randn(4, 3, 3, 3, generator=generator), "b": torch.randn(8, 4, 1, 1, generator=generator)}
    return Layout([(key, tuple(weight.shape)) for key, weight in state.items()]), state  # type: ignore[misc]


def test_an_order_is_found_once_for_the_same_weights(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout, state = _network()
    first = addresses(layout, state, "cross_filter")
    assert len(list(cache.iterdir())) == 1
    monkeypatch.delattr(MODULE, "positions")  # nothing is computed again
    assert torch.equal(addresses(layout, state, "cross_filter"), first)
    for other in ((layout, state, "in_filter"), (layout, _network(1)[1], "cross_filter")):
        with pytest.raises(NameError, match="positions"):
            addresses(*other)  # type: ignore[arg-type]


def test_a_damaged_file_in_the_cache_is_replaced(cache: Path) -> None:
    layout, state = _network()
    first = addresses(layout, state, "cross_filter")
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    for damaged in (b"", whole[:20], whole[:-3]):
        file.write_bytes(damaged)
        assert torch.equal(addresses(layout, state, "cross_filter"), first)
        assert file.read_bytes() == whole


@pytest.mark.parametrize(
    "change",
    [
        lambda table: table[:-1],
        lambda table: table.float(),
        lambda table: torch.zeros_like(table),
        lambda table: table + 1,
        lambda table: -table,
        lambda table: table[:, 0],
        lambda table: table.flip(0),
    ],
)
def test_a_cached_order_that_is_none_of_the_network_is_replaced(
    cache: Path, change: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    layout, state = _network()
    first = addresses(layout, state, "in_filter")
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    file.write_bytes(save({"addresses": change(first.int()).contiguous()}))
    assert torch.equal(addresses(layout, state, "in_filter"), first)
    assert file.read_bytes() == whole
    file.write_bytes(save({"other": first}))
    assert torch.equal(addresses(layout, state, "in_filter"), first)
    file.unlink()
    file.mkdir()  # cannot be replaced
    assert torch.equal(addresses(layout, state, "in_filter"), first)


def test_a_cache_that_cannot_be_written_costs_time_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nernlit").write_text("a file where the folder should be")
    monkeypatch.setattr(MODULE, "user_cache_path", lambda name: tmp_path / name)
    monkeypatch.setattr(MODULE, "_CACHED_FROM", 1)
    layout, state = _network()
    assert sorted(map(tuple, addresses(layout, state, "in_filter").tolist())) == sorted(
        (layer, f, c) for layer, (o, i) in enumerate([(4, 3), (8, 4)]) for f in range(o) for c in range(i)
    )
