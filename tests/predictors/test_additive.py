import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from nernlit.predictors.additive import (
    _smallest,
    additive_codes,
    all_code_costs,
    beam_search,
    code_costs,
    decoded,
    k_means_step,
    nearest,
    sweep,
    total_work,
)
from tests.reference import additive as slow

N, D, M, C = 60, 4, 3, 5


def _problem(masked: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Blocks, weights, codebooks and codes; in half of the blocks two numbers have weight 0."""
    generator = torch.Generator().manual_seed(3)
    blocks, weights = torch.randn(N, D, generator=generator), torch.rand(N, D, generator=generator) + 0.1
    if masked:
        weights[::2, 1:3] = 0
    codewords = torch.randn(M, C, D, generator=generator)
    codes = torch.randint(0, C, (M, N), generator=generator)
    return blocks.double(), weights.double(), codewords.double(), codes


def _sum(codewords: Tensor, codes: tuple[int, ...]) -> np.ndarray:
    return np.sum([codewords[book, code].numpy() for book, code in enumerate(codes)], axis=0)


def _error(blocks: Tensor, weights: Tensor, codewords: Tensor, codes: Tensor) -> float:
    return float((weights * (blocks - decoded(codewords, codes)).square()).sum())


def _cost(blocks: Tensor, weights: Tensor, codewords: Tensor, codes: Tensor, code_costs: Tensor) -> float:
    return _error(blocks, weights, codewords, codes) + float(code_costs.gather(1, codes).sum())


@pytest.mark.parametrize("cost_per_bit", [0.0, 0.05])
@pytest.mark.parametrize("masked", [False, True])
def test_a_k_means_step_is_the_slow_one(masked: bool, cost_per_bit: float) -> None:
    blocks, weights, codewords, given = _problem(masked)
    given[0, :40] = 2  # more frequent than the others
    codes, moved = k_means_step(blocks, weights, codewords[0], code_costs(given[0], C, cost_per_bit))
    paid = slow.code_costs(given[0].tolist(), C, cost_per_bit)
    expected = slow.nearest(blocks.numpy(), weights.numpy(), codewords[0].numpy(), paid)
    assert codes.tolist() == expected
    assert len(set(expected)) == C
    means = slow.means(blocks.numpy(), weights.numpy(), expected, codewords[0].numpy())
    assert np.allclose(moved.numpy(), means, atol=1e-12)


@pytest.mark.parametrize("cost_per_bit", [0.0, 0.05])
@pytest.mark.parametrize("masked", [False, True])
def test_a_sweep_is_the_slow_one(masked: bool, cost_per_bit: float) -> None:
    blocks, weights, codewords, codes = _problem(masked)
    moved, found = sweep(blocks, weights, codewords.clone(), codes.clone(), cost_per_bit)
    numbers = [each.numpy() for each in (blocks, weights, codewords, codes)]
    expected, expected_codes = slow.sweep(*numbers, cost_per_bit)
    assert found.tolist() == expected_codes.tolist()
    assert np.allclose(moved.numpy(), expected, atol=1e-12)
    paid = all_code_costs(codes, C, cost_per_bit)
    assert _cost(blocks, weights, moved, found, paid) < _cost(blocks, weights, codewords, codes, paid)


@pytest.mark.parametrize("cost_per_bit", [0.0, 0.3])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("width", [1, 3, C**M])
def test_the_beam_search_is_the_slow_one(width: int, masked: bool, cost_per_bit: float) -> None:
    blocks, weights, codewords, codes = _problem(masked)
    paid = [slow.code_costs(own, C, cost_per_bit) for own in codes.tolist()]
    found = beam_search(blocks, weights, codewords, codes, width, all_code_costs(codes, C, cost_per_bit))
    for number, (block, weight) in enumerate(zip(blocks.numpy(), weights.numpy(), strict=True)):
        searched = slow.beam_search(block, weight, codewords.numpy(), width, paid)
        choices = [searched, tuple(codes[:, number].tolist())]  # the given codes stay if they are better
        best = min(choices, key=lambda own: slow.cost(block, weight, codewords.numpy(), own, paid))
        assert tuple(found[:, number].tolist()) == best


def test_a_beam_of_all_combinations_finds_the_best_codes() -> None:
    blocks, weights, codewords, codes = _problem(masked=True)
    found = beam_search(blocks, weights, codewords, codes, C**M)
    for number in range(N):
        block, weight = blocks[number].numpy(), weights[number].numpy()
        errors = [
            slow.error(block, weight, _sum(codewords, choice)) for choice in itertools.product(range(C), repeat=M)
        ]
        own = slow.error(block, weight, decoded(codewords, found)[number].numpy())
        assert own == pytest.approx(min(errors))


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks, weights, codewords, codes = _problem(masked=True)
    whole = nearest(blocks, weights, codewords[0]), beam_search(blocks, weights, codewords, codes, 2)
    monkeypatch.setattr("nernlit.predictors.additive._CHUNK_ELEMENTS", 7 * C)
    assert torch.equal(nearest(blocks, weights, codewords[0]), whole[0])
    assert torch.equal(beam_search(blocks, weights, codewords, codes, 2), whole[1])


def test_an_unused_codeword_moves_to_the_block_with_the_largest_error() -> None:
    blocks = torch.tensor([[0.0], [0.1], [5.0]])
    codes, moved = k_means_step(blocks, torch.ones(3, 1), torch.tensor([[0.0], [100.0]]))
    assert codes.tolist() == [0, 0, 0]
    assert torch.allclose(moved, torch.tensor([[1.7], [5.0]]))


def test_more_sweeps_never_have_a_larger_error() -> None:
    blocks, weights, _, _ = _problem(masked=True)
    generator = torch.Generator().manual_seed(0)
    codewords, codes = additive_codes(blocks, weights, M, C, 1, 2, N, generator)
    errors = [_error(blocks, weights, codewords, codes)]
    for _ in range(5):
        codewords, codes = sweep(blocks, weights, codewords, codes)
        errors.append(_error(blocks, weights, codewords, codes))
        codes = beam_search(blocks, weights, codewords, codes, 4)
        errors.append(_error(blocks, weights, codewords, codes))
    assert errors == sorted(errors, reverse=True)


def test_a_price_gives_a_smaller_error_for_the_same_bits() -> None:
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randn(2_000, D, generator=generator) * torch.rand(2_000, 1, generator=generator)
    weights, found = torch.ones_like(blocks), []
    for codewords, price in ((8, 0.0), (16, 0.03), (16, 0.0)):
        options = 2, codewords, 10, 4, len(blocks), torch.Generator().manual_seed(0)
        books, codes = additive_codes(blocks, weights, *options, price=price)
        counts = torch.stack([own.bincount(minlength=codewords) for own in codes]) / len(blocks)
        bits = -float(torch.special.xlogy(counts, counts).sum()) / math.log(2)
        found.append((bits, _error(blocks, weights, books, codes) / len(blocks)))
    few, priced, many = found
    assert priced[0] < many[0]
    # A line between the two points without a price is above the point with one.
    share = (priced[0] - few[0]) / (many[0] - few[0])
    assert 0 < share < 1
    assert priced[1] < 0.95 * few[1] ** (1 - share) * many[1] ** share


def test_sums_of_codewords_are_nearly_found_again() -> None:
    generator = torch.Generator().manual_seed(0)
    books = torch.randn(2, 4, 6, generator=generator) * torch.tensor([10.0, 1.0]).view(2, 1, 1)
    blocks = decoded(books, torch.randint(0, 4, (2, 200), generator=generator))
    weights = torch.ones_like(blocks)
    codewords, codes = additive_codes(blocks, weights, 2, 4, 20, 8, 200, generator)
    assert _error(blocks, weights, codewords, codes) < 0.01 * float(blocks.square().sum())


def test_the_seed_decides() -> None:
    blocks, weights, _, _ = _problem(masked=True)
    one = additive_codes(blocks, weights, M, C, 3, 2, N, torch.Generator().manual_seed(1))
    again = additive_codes(blocks, weights, M, C, 3, 2, N, torch.Generator().manual_seed(1))
    other = additive_codes(blocks, weights, M, C, 3, 2, N, torch.Generator().manual_seed(2))
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert not torch.equal(one[1], other[1])


@pytest.mark.parametrize("count", [1, 3, 7])
def test_fewer_blocks_than_codewords_are_exact(count: int) -> None:
    blocks = torch.randn(count, D, generator=torch.Generator().manual_seed(0))
    codewords, codes = additive_codes(
        blocks, torch.ones_like(blocks), 2, 8, 3, 2, 100, torch.Generator().manual_seed(0)
    )
    assert torch.allclose(decoded(codewords, codes), blocks, atol=1e-5)


@pytest.mark.parametrize("sample", [20, N, 2 * N])
def test_the_reported_work_adds_up(sample: int) -> None:
    blocks, weights, _, _ = _problem(masked=False)
    done: list[int] = []
    additive_codes(blocks, weights, M, C, 3, 2, sample, torch.Generator().manual_seed(0), done.append)
    assert sum(done) == total_work(N, M, 3, 2, sample)


def test_a_sample_finds_codebooks_for_all_blocks() -> None:
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randn(20_000, D, generator=generator)
    weights = torch.ones_like(blocks)
    errors = []
    for sample in (len(blocks), 2_000):
        codewords, codes = additive_codes(blocks, weights, 2, 8, 10, 4, sample, generator)
        errors.append(_error(blocks, weights, codewords, codes))
    assert codes.shape == (2, len(blocks))
    assert errors[1] < 1.03 * errors[0] < 0.3 * float(blocks.square().sum())


@pytest.mark.parametrize(("count", "choices"), [(1, 64), (4, 64), (5, 128), (3, 15), (64, 64)])
def test_the_smallest_values_are_found_in_groups(count: int, choices: int) -> None:
    values = torch.randn(50, choices, generator=torch.Generator().manual_seed(0))
    found = values.gather(1, _smallest(values, count)).sort(1).values
    assert torch.equal(found, values.topk(count, largest=False).values)
