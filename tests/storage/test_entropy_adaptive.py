"""The adaptive coder of quantized weights: exact, small, the same on every machine, safe on damaged bytes."""

import hashlib
import math
import subprocess
import sys
import time
from decimal import Decimal

import numpy as np
import pytest
import torch
from torch import Tensor

from nernlit.errors import FileFormatError
from nernlit.storage import entropy_tables
from nernlit.storage.entropy import LARGEST_WEIGHT, Part, decode_weights, encode_weights
from tests.reference.adaptive import Decoder

KERNELS: list[Part] = [(6, 5, 3, 3), (2, 7, 1, 3), (40, 30, 1, 1), (3, 2, 7, 5)]
COUNT = sum(map(math.prod, KERNELS))


def _normal(count: int, deviation: float, seed: int = 0) -> Tensor:
    return (deviation * torch.randn(count, generator=torch.Generator().manual_seed(seed))).round().long()


def _entropy_bytes(integers: Tensor) -> float:
    counts = integers.unique(return_counts=True)[1].double()
    return float(-(counts * (counts / counts.sum()).log2()).sum()) / 8


def _filters(seed: int = 0) -> Tensor:
    """Smooth kernels of filters and channels of different scales, (64, 32, 3, 3)."""
    generator = torch.Generator().manual_seed(seed)
    scales = 2 * torch.rand(64, 1, 1, 1, generator=generator) * torch.rand(1, 32, 1, 1, generator=generator)
    return scales * (torch.randn(64, 32, 1, 1, generator=generator) + torch.randn(64, 32, 3, 3, generator=generator))


@pytest.mark.parametrize(
    ("integers", "parts"),
    [
        ([], []),
        ([], [(0, 3, 1, 1), (10**30, 0, 1, 1)]),
        ([7], [(1, 1, 1, 1)]),
        ([0], [(1, 1, 1, 1)]),
        ([LARGEST_WEIGHT, -LARGEST_WEIGHT, 0, 2**15, -(2**15), 1], [(1, 1, 2, 3)]),
        ([3] * 50, [(5, 10, 1, 1)]),
        ([3, -3, 0, 1, 2, 0], [(1, 2, 1, 1), (0, 2, 3, 3), (1, 1, 4, 1)]),
        ([0] * 3000, [(3000, 1, 1, 1)]),
        ([-1] * 3000, [(1, 3000, 1, 1)]),
    ],
)
def test_integers_come_back(integers: list[int], parts: list[Part]) -> None:
    decoded = decode_weights(encode_weights(torch.tensor(integers, dtype=torch.int64), parts), parts)
    assert decoded.dtype == torch.int64
    assert decoded.tolist() == integers


@pytest.mark.parametrize("deviation", [0.02, 0.3, 1.0, 5.0, 300.0, 15_000.0])
def test_random_integers_come_back(deviation: float) -> None:
    integers = _normal(COUNT, deviation).clamp(-LARGEST_WEIGHT, LARGEST_WEIGHT)
    integers[::7] = 0
    assert torch.equal(decode_weights(encode_weights(integers.int(), KERNELS), KERNELS), integers)


def test_integers_that_surprise_the_model_come_back() -> None:
    integers = torch.zeros(50_000, dtype=torch.int64)
    integers[-3000:] = torch.randint(-LARGEST_WEIGHT, LARGEST_WEIGHT, (3000,), generator=torch.Generator())
    parts = [(50, 1000, 1, 1)]
    packed = encode_weights(integers, parts)
    assert len(packed) > 2 * 3000
    assert torch.equal(decode_weights(packed, parts), integers)


@pytest.mark.parametrize("deviation", [0.5, 3.0, 300.0])
def test_a_slow_decoder_written_from_the_description_reads_the_same(deviation: float) -> None:
    integers = _normal(COUNT, deviation)
    decoder = Decoder(bytes(encode_weights(integers, KERNELS).tolist()))
    assert decoder.numbers(KERNELS) == integers.tolist()


def test_these_bytes_are_these_integers_on_every_machine() -> None:
    parts: list[Part] = [(2, 2, 3, 3), (2, 3, 1, 1)]
    integers = [*([0, 0, 1, 0, 1, 2, -1, 0, 1] * 2), *([0, -1, -1, 0, 0, 0, 0, 0, 1] * 2), *[0, 300, -7, 0, 1, 2]]
    coded = "ac55dda4bb2d6fe9c711b8e4"
    assert bytes(encode_weights(torch.tensor(integers), parts).tolist()).hex() == coded
    assert decode_weights(torch.tensor(list(bytes.fromhex(coded)), dtype=torch.uint8), parts).tolist() == integers


def test_the_tables_are_the_same_on_every_machine() -> None:
    digest = hashlib.sha256()
    for table in (entropy_tables.PROBABILITIES, entropy_tables.LOGITS, entropy_tables.RATES):
        digest.update(table.astype("<i4").tobytes())
    assert digest.hexdigest() == "7632b84d4c3d156a8da83a9f1709ed1b5be0549e3840201f84082fd8cd430247"


def test_probabilities_are_those_of_their_logits() -> None:
    largest = entropy_tables.LARGEST_LOGIT
    for logit in (-largest, -256, 0, 1, 700, largest):
        expected = 65536 / (1 + (Decimal(-logit) / 256).exp())
        assert abs(int(entropy_tables.PROBABILITIES[logit + largest]) - expected) <= 1
    assert (np.diff(entropy_tables.PROBABILITIES) >= 0).all()
    middles = (np.arange(4096) + 0.5) / 4096
    exact = 256 * np.log(middles / (1 - middles))
    inner = np.abs(exact) < 256 * 5
    assert np.abs(entropy_tables.LOGITS - exact)[inner].max() < 2


@pytest.mark.parametrize(
    ("deviation", "count", "more"), [(0.4, 18_000, 48), (1.3, 18_000, 48), (1.3, 900, 24), (6.0, 18_000, 96)]
)
def test_unrelated_integers_take_little_more_than_their_entropy(deviation: float, count: int, more: int) -> None:
    integers = _normal(count, deviation)
    for part in ((count // 100, 100, 1, 1), (count // 900, 100, 3, 3)):
        assert -8 < len(encode_weights(integers, [part])) - _entropy_bytes(integers) < more


def test_equal_integers_take_a_few_bytes() -> None:
    assert len(encode_weights(torch.zeros(100_000, dtype=torch.int64), [(100, 1000, 1, 1)])) < 30
    assert len(encode_weights(torch.full((9000,), -5), [(10, 100, 3, 3)])) < 60


def test_related_weights_take_less_than_their_entropy() -> None:
    weights = _filters()
    for step, least in ((1.0, 0.85), (0.25, 0.93)):
        integers = (weights / step).round().long().flatten()
        assert len(encode_weights(integers, [(64, 32, 3, 3)])) < least * _entropy_bytes(integers)


def test_rows_and_columns_of_matrices_are_used() -> None:
    matrix = torch.randn(200, 100, generator=torch.Generator().manual_seed(0))
    for scales in (torch.linspace(0.05, 1, 200)[:, None], torch.linspace(0.05, 1, 100)):
        integers = (2 * matrix * scales).round().long().flatten()
        assert len(encode_weights(integers, [(200, 100, 1, 1)])) < 0.94 * _entropy_bytes(integers)


def test_what_was_learned_helps_in_the_next_part() -> None:
    integers = (_filters() / 0.7).round().long().flatten()
    whole, halves = [(64, 32, 3, 3)], [(1, 32, 3, 3)] * 64
    assert len(encode_weights(integers, halves)) < 1.1 * len(encode_weights(integers, whole))


def test_wrong_integers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"integers of shape \(3,\) in parts of \[\(1, 2, 1, 1\)\]; expected the same"):
        encode_weights(torch.tensor([1, 2, 3]), [(1, 2, 1, 1)])
    with pytest.raises(ValueError, match=r"an integer is outside -65535\.\.65535"):
        encode_weights(torch.tensor([-65536]), [(1, 1, 1, 1)])


def test_coded_weights_of_another_form_are_refused() -> None:
    packed = encode_weights(_normal(COUNT, 1.0), KERNELS)
    for wrong in (packed.float(), packed[None]):
        with pytest.raises(FileFormatError, match=r"coded weights are torch.* of shape .*; expected bytes"):
            decode_weights(wrong, KERNELS)
    longer = torch.cat([packed, torch.zeros(3, dtype=torch.uint8)])
    with pytest.raises(FileFormatError, match=rf"damaged: they have {len(packed) + 3} bytes; expected {len(packed)}"):
        decode_weights(longer, KERNELS)
    with pytest.raises(FileFormatError, match="coded weights are damaged"):
        decode_weights(packed[:0], KERNELS)


def test_damaged_bytes_give_other_integers_or_one_error_in_bounded_time() -> None:
    integers = torch.cat([_normal(COUNT, 1.0), _normal(COUNT, 3000.0)])
    packed, start, messages = encode_weights(integers, KERNELS * 2), time.monotonic(), set()
    for seed in range(300):
        chance = np.random.default_rng(seed)
        damaged = packed.clone()
        places = torch.from_numpy(chance.integers(0, chance.choice([16, len(packed)]), 3))
        damaged[places] = torch.from_numpy(chance.integers(0, 256, 3, dtype=np.uint8))
        if seed % 4 == 0:
            fill = chance.choice([0, 255, 256])
            random = chance.integers(0, 256, chance.integers(0, 5000), dtype=np.uint8)
            damaged = torch.from_numpy(random if fill == 256 else np.full_like(random, fill))
        try:
            decoded = decode_weights(damaged, KERNELS * 2)
            assert decoded.shape == integers.shape
            assert int(decoded.abs().max()) <= LARGEST_WEIGHT
        except FileFormatError as error:
            messages.add(str(error).partition(":")[0])
    assert messages == {"coded weights are damaged"}
    assert time.monotonic() - start < 60


def test_270_thousand_integers_are_decoded_in_a_moment() -> None:
    parts: list[Part] = [(64, 64, 3, 3)] * 7 + [(100, 100, 1, 1)]
    integers = _normal(sum(map(math.prod, parts)), 1.3)
    packed = encode_weights(integers, parts)
    start = time.process_time()
    decoded = decode_weights(packed, parts)
    assert time.process_time() - start < 1
    assert torch.equal(decoded, integers)


def test_numba_is_imported_only_where_weights_are_coded() -> None:
    code = "import sys, nernlit.storage.entropy, nernlit.predictors; assert 'numba' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
