"""The entropy coder: exact round trips, near the entropy, the same on every machine, safe on damaged bytes."""

import random
import time

import constriction
import numpy as np
import pytest
import torch
from torch import Tensor

from nernlit.errors import FileFormatError
from nernlit.storage.entropy import cost_bits, decode, decode_uniform, encode, encode_uniform
from nernlit.storage.entropy_models import PRECISION, free_counts


def _entropy_bits(integers: Tensor) -> float:
    counts = integers.unique(return_counts=True)[1].double()
    return float(-(counts * (counts / counts.sum()).log2()).sum())


def _normal(count: int, deviation: float, seed: int = 0) -> Tensor:
    return (deviation * torch.randn(count, generator=torch.Generator().manual_seed(seed))).round().long()


@pytest.mark.parametrize(
    ("integers", "groups"),
    [
        ([], []),
        ([], [0, 0]),
        ([7], [1]),
        ([-(2**63)], [1]),
        ([2**63 - 1, -(2**63), 0], [3]),
        ([2**63 - 1, -(2**63), 0], [1, 1, 1]),
        ([3] * 50, [50]),
        ([3] * 50, [20, 0, 30]),
        ([0, 1], [2]),
        ([0, 4095, 5], [3]),
        ([0, 4096, 5], [3]),
        ([10**9, -1, 0, 1], [2, 2]),
    ],
)
def test_integers_come_back(integers: list[int], groups: list[int]) -> None:
    decoded = decode(encode(torch.tensor(integers, dtype=torch.int64), groups), groups)
    assert decoded.dtype == torch.int64
    assert decoded.tolist() == integers


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool])
def test_integers_of_every_type_come_back(dtype: torch.dtype) -> None:
    integers = torch.tensor([0, 1, 1, 0, 1]).to(dtype)
    assert decode(encode(integers, [5]), [5]).tolist() == [0, 1, 1, 0, 1]


def test_random_integers_come_back() -> None:
    chance = random.Random(0)
    for _ in range(60):
        groups = [chance.choice([0, 1, 2, 10, 300]) for _ in range(chance.randrange(5))]
        kinds = [chance.choice(["normal", "uniform", "few", "wide"]) for _ in groups]
        integers: list[int] = []
        for kind, count in zip(kinds, groups, strict=True):
            center, width = chance.choice([0, 5, -(2**40)]), chance.choice([1, 3, 100, 10**6])
            draw = {
                "normal": lambda c=center, w=width: c + round(chance.gauss(0, w)),
                "uniform": lambda c=center, w=width: c + chance.randrange(w),
                "few": lambda c=center, w=width: c + chance.choice([0, 0, 0, w]),
                "wide": lambda: chance.randrange(-(2**63), 2**63),
            }[kind]
            integers += [draw() for _ in range(count)]
        packed = encode(torch.tensor(integers, dtype=torch.int64), groups)
        assert decode(packed, groups).tolist() == integers


@pytest.mark.parametrize("deviation", [0.4, 0.7, 1.3, 5.0])
def test_the_layers_of_a_network_take_their_entropy_and_few_bytes_each(deviation: float) -> None:
    groups = [432, *[2304] * 6, 4608, *[9216] * 5, 18432, *[36864] * 5]
    parts = [_normal(count, deviation * (1 + seed / 50), seed) for seed, count in enumerate(groups)]
    least = sum(map(_entropy_bits, parts))
    assert least < cost_bits(torch.cat(parts), groups) < least + 8 * 12 * len(groups)


def test_two_hundred_integers_of_seven_values_take_two_bytes_more_than_their_entropy() -> None:
    parts = [_normal(200, 1.2, seed) for seed in range(40)]
    least = sum(map(_entropy_bits, parts))
    assert cost_bits(torch.cat(parts), [200] * 40) < least + 8 * 2 * 40


def test_codes_without_a_shape_take_little_more_than_their_entropy() -> None:
    chance = np.random.default_rng(0)
    codes = torch.from_numpy(chance.choice(64, p=chance.dirichlet(np.full(64, 3.0)), size=30_000))
    assert cost_bits(codes, [30_000]) < _entropy_bits(codes) + 8 * 60
    equal = torch.from_numpy(chance.integers(0, 256, 10_000))
    assert cost_bits(equal, [10_000]) <= 8 * (10_000 + 16)


def test_these_bytes_are_these_integers_on_every_machine() -> None:
    packed = torch.tensor(list(bytes.fromhex("4728f75b1a11a9fdb7d33b3cd1fc01f2ef7aea106b7f892d")), dtype=torch.uint8)
    assert decode(packed, [40, 5]).tolist() == [
        *(
            -1,
            -1,
            0,
            0,
            1,
            1,
            0,
            -2,
            0,
            -1,
            0,
            0,
            0,
            1,
            1,
            0,
            -1,
            -2,
            1,
            1,
            1,
            -2,
            0,
            2,
            0,
            -1,
            1,
            0,
            0,
            -1,
            1,
            0,
            1,
            0,
            -1,
            0,
            -1,
            0,
            -2,
            2,
        ),
        *(0, 1, 2, 300, -5),
    ]


def test_a_model_has_exactly_its_probabilities() -> None:
    counts_S = free_counts(np.array([3, 0, 8, 200, 17]))
    assert counts_S.sum() + 5 == 2**PRECISION
    model = constriction.stream.model.Categorical(counts_S.astype(np.float64), perfect=False)
    ends = np.cumsum(counts_S + 1)
    for symbol, (start, end) in enumerate(zip(ends - counts_S - 1, ends, strict=True)):
        for quantile in (start, end - 1):  # what the lowest bits of a stack are decides which symbol comes off it
            coder = constriction.stream.stack.AnsCoder(np.array([quantile], dtype=np.uint32), seal=True)
            assert coder.decode(model) == symbol


def test_groups_must_have_all_integers() -> None:
    with pytest.raises(ValueError, match=r"3 integers in groups of \[2\]; expected the same number"):
        encode(torch.tensor([1, 2, 3]), [2])
    with pytest.raises(ValueError, match=r"torch.float32 of shape \(2,\); expected integers in one dimension"):
        encode(torch.zeros(2), [2])
    with pytest.raises(ValueError, match=r"torch.int64 of shape \(1, 2\); expected integers in one dimension"):
        encode(torch.zeros(1, 2, dtype=torch.int64), [2])


def test_coded_integers_of_another_form_are_refused() -> None:
    packed = encode(_normal(100, 1.0), [100])
    for wrong in (packed[:-1], packed.float(), packed[None]):
        with pytest.raises(FileFormatError, match="expected bytes, a multiple of 4"):
            decode(wrong, [100])
    with pytest.raises(FileFormatError, match="has less than 0 integers; expected at least 0"):
        decode(packed, [101, -1])
    with pytest.raises(FileFormatError, match="damaged: there are more bytes than integers"):
        decode(packed, [50])


def test_equally_probable_integers_take_the_logarithms_of_their_sizes() -> None:
    sizes = torch.randint(2, 1000, (5000,), generator=torch.Generator().manual_seed(0))
    integers = torch.randint(0, 2**31, (5000,), generator=torch.Generator().manual_seed(1)) % sizes
    packed = encode_uniform(integers, sizes)
    assert torch.equal(decode_uniform(packed, sizes), integers)
    assert 0 <= 8 * len(packed) - float(sizes.double().log2().sum()) < 64
    assert decode_uniform(encode_uniform(sizes[:0], sizes[:0]), sizes[:0]).shape == (0,)
    with pytest.raises(FileFormatError, match="expected bytes, a multiple of 4"):
        decode_uniform(packed[:-1], sizes)
    with pytest.raises(FileFormatError, match="there are more bytes than integers"):
        decode_uniform(packed, sizes[:100])


def test_damaged_bytes_give_other_integers_or_one_error_in_bounded_time() -> None:
    groups = [500, 20, 3000]
    integers = torch.cat([_normal(500, 1.0), _normal(20, 10**9), _normal(3000, 30)])
    packed, start, refused, messages = encode(integers, groups), time.monotonic(), 0, set()
    for seed in range(400):
        chance = np.random.default_rng(seed)
        damaged = packed.clone()
        places = torch.from_numpy(chance.integers(0, chance.choice([16, len(packed)]), 3))
        damaged[places] = torch.from_numpy(chance.integers(0, 256, 3, dtype=np.uint8))
        if seed % 4 == 0:
            damaged = torch.from_numpy(chance.integers(0, 256, 4 * chance.integers(0, 50), dtype=np.uint8))
        try:
            assert decode(damaged, groups).shape == (3520,)
        except FileFormatError as error:
            messages.add(str(error).partition(":")[0])
            refused += 1
    assert messages == {"coded integers are damaged"}
    assert refused > 100
    assert time.monotonic() - start < 60


def test_270_thousand_integers_are_decoded_in_a_moment() -> None:
    integers = _normal(270_000, 1.3)
    packed = encode(integers, [270_000])
    start = time.process_time()
    decoded = decode(packed, [270_000])
    assert time.process_time() - start < 0.2
    assert torch.equal(decoded, integers)
