import math

import numpy as np
import pytest
import torch

from nernlit.predictors.grid import LIMIT, Counts, repeat_per_group, round_ste, round_to_half, sum_per_group

SIZES = [5, 1, 30, 7]


def _numbers() -> torch.Tensor:
    return torch.randn(sum(SIZES), generator=torch.Generator().manual_seed(0)).mul(3).round()


def test_rounding_has_the_gradient_of_the_identity() -> None:
    values = torch.tensor([0.2, -1.7, 2.5, 1e9], requires_grad=True)
    round_ste(values).square().sum().backward()
    assert round_ste(values).tolist() == [0.0, -2.0, 2.0, LIMIT]
    assert values.grad is not None
    assert values.grad.tolist() == [0.0, -4.0, 4.0, 2.0 * LIMIT]


def test_halved_numbers_are_those_of_float16() -> None:
    values = torch.tensor([0.1, 1 / 3], requires_grad=True)
    assert round_to_half(values).tolist() == [float(np.float16(0.1)), float(np.float16(np.float32(1 / 3)))]
    round_to_half(values).sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [1.0, 1.0]


def test_spread_and_its_gradient_equal_those_of_an_index() -> None:
    values = torch.randn(len(SIZES), dtype=torch.float64, requires_grad=True)
    index = torch.cat([torch.full((size,), group) for group, size in enumerate(SIZES)])
    assert torch.equal(repeat_per_group(values, SIZES), values[index])
    weights = torch.randn(sum(SIZES), dtype=torch.float64)
    (own,) = torch.autograd.grad((repeat_per_group(values, SIZES) * weights).sum(), values)
    (reference,) = torch.autograd.grad((values[index] * weights).sum(), values)
    assert torch.allclose(own, reference)


def test_the_entropy_equals_a_count_by_hand() -> None:
    numbers, expected = _numbers(), []
    for group in numbers.split(SIZES):
        _, counts = np.unique(group.numpy(), return_counts=True)
        expected.append(-sum(count * math.log2(count / len(group)) for count in counts))
    assert float(Counts(numbers, SIZES).entropy_bits()) == pytest.approx(sum(expected))
    per_number = [bits / size for bits, size in zip(expected, SIZES, strict=True)]
    assert Counts(numbers, SIZES).entropies().tolist() == pytest.approx(per_number)


def test_the_bits_of_whole_numbers_are_near_their_entropy() -> None:
    numbers = torch.randn(20_000, generator=torch.Generator().manual_seed(0)).mul(2).round()
    counts = Counts(numbers, [20_000])
    assert float(counts.bits(numbers).sum()) == pytest.approx(float(counts.entropy_bits()), rel=1e-3)


def test_bits_between_whole_numbers_are_interpolated_with_the_gradient_of_the_line() -> None:
    counts = Counts(torch.tensor([0.0, 0.0, 0.0, 1.0]), [4])
    values = torch.tensor([0.25, 0.0, 1.0, -0.5], requires_grad=True)
    bits = counts.bits(values)
    # Of 4 numbers and half a one for each of -1, 0, 1 and 2.
    at = {number: math.log2(6 / (count + 0.5)) for number, count in ((-1, 0), (0, 3), (1, 1), (2, 0))}
    assert bits.tolist() == pytest.approx([0.75 * at[0] + 0.25 * at[1], at[0], at[1], 0.5 * at[-1] + 0.5 * at[0]])
    bits.sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == pytest.approx([at[1] - at[0], at[1] - at[0], at[2] - at[1], at[0] - at[-1]])


@pytest.mark.parametrize("sizes", [[3_000_001], [1024, 5, 70_000, 1025]])
def test_sums_of_large_groups_are_exact_to_single_precision(sizes: list[int]) -> None:
    values = torch.rand(sum(sizes), generator=torch.Generator().manual_seed(0)).requires_grad_()
    sums = sum_per_group(values, sizes)
    expected = torch.stack([part.double().sum() for part in values.split(sizes)])
    assert torch.allclose(sums.double(), expected, rtol=1e-6)
    weights = torch.arange(1.0, len(sizes) + 1)
    (sums * weights).sum().backward()
    assert values.grad is not None
    assert torch.equal(values.grad, weights.repeat_interleave(torch.tensor(sizes)))


def test_gradients_of_repeated_values_are_sums_of_large_groups() -> None:
    sizes, values = [2_000_000, 3], torch.ones(2, requires_grad=True)
    repeat_per_group(values, sizes).mul(0.1).sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == pytest.approx([200_000, 0.3], rel=1e-5)
