import math
from itertools import product
from math import comb

import pytest
import torch

from nernlit.analysis import correct_answers, paired_difference
from nernlit.errors import UsageError


def test_the_p_value_is_the_exact_binomial_tail() -> None:
    one = torch.tensor([True] * 9 + [False] * 2 + [True] * 30)
    other = torch.tensor([False] * 9 + [True] * 2 + [True] * 30)
    tail = sum(comb(11, k) for k in range(9, 12)) / 2**11
    result = paired_difference(one, other)
    assert result.p_value == pytest.approx(2 * tail)
    assert result.difference == pytest.approx(7 / 41)
    assert result.low < result.difference < result.high


def test_the_interval_is_that_of_the_mean_of_paired_differences() -> None:
    generator = torch.Generator().manual_seed(0)
    one, other = torch.rand(2, 500, generator=generator) > 0.3
    gaps = one.double() - other.double()
    half = 1.96 * float(gaps.std(correction=0)) / 500**0.5
    result = paired_difference(one, other)
    assert result.difference == pytest.approx(float(gaps.mean()))
    assert (result.low, result.high) == pytest.approx((float(gaps.mean()) - half, float(gaps.mean()) + half))


def test_swapping_the_two_turns_the_sign() -> None:
    for bits in product([False, True], repeat=4):
        one, other = torch.tensor(bits[:2] * 3), torch.tensor(bits[2:] * 3)
        forth, back = paired_difference(one, other), paired_difference(other, one)
        assert forth.difference == -back.difference
        assert forth.p_value == back.p_value


def test_answers_to_other_images_are_refused() -> None:
    with pytest.raises(ValueError, match=r"shapes \(2,\) and \(3,\): expected equal shapes and at least one image"):
        paired_difference(torch.ones(2).bool(), torch.ones(3).bool())


def test_logits_that_are_no_numbers_give_no_accuracy() -> None:
    batches = [(torch.rand(3, 1, 2, 2), torch.zeros(3, dtype=torch.long))]
    logits = torch.eye(3)
    logits[1, 2] = math.nan
    with pytest.raises(UsageError, match="logits are NaN for 1 of 3 images, so its accuracy is undefined"):
        correct_answers(lambda images: logits, batches)
    with pytest.raises(ValueError, match="no images to measure on"):
        correct_answers(lambda images: logits, [])
    assert correct_answers(lambda images: torch.eye(3), batches).tolist() == [True, False, False]
    infinite = torch.tensor([[math.inf, 0.0, 0.0], [1.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    assert correct_answers(lambda images: infinite, batches).tolist() == [False, True, True]  # as in `test/acc`
