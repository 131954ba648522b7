"""Additive quantization: a block is the sum of one codeword of each codebook (as in arXiv 2111.10320).

Residual k-means finds the first codebooks: each fits what the codebooks before it leave. Sweeps then improve them
together: a beam search looks for better codes of each block, and in turn each codebook makes a k-means step on what all
the others leave (iterated conditional modes). No step of a sweep increases the weighted squared error.

Shapes: N blocks, D numbers of a block, M codebooks, C codewords of each, B beam width.
"""

from collections.abc import Callable

import torch
from torch import Tensor

#: Distances that are computed at once; bounds the memory.
_AT_ONCE = 2**22


def nearest(blocks_ND: Tensor, weights_ND: Tensor, codewords_CD: Tensor) -> Tensor:
    """The codeword with the least weighted squared error for each block, (N,) int64.

    >>> nearest(torch.tensor([[0.9, 9.0]]), torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 9.0], [1.0, 0.0]]))
    tensor([1])
    """
    # sum w (x - c)^2 without sum w x^2, which is the same for all codewords: one matrix product.
    factors = torch.cat([-2 * codewords_CD, codewords_CD.square()], dim=1).T
    rows = max(1, _AT_ONCE // len(codewords_CD))
    parts = [
        (torch.cat([weights * blocks, weights], dim=1) @ factors).argmin(1)
        for blocks, weights in zip(blocks_ND.split(rows), weights_ND.split(rows), strict=True)
    ]
    return torch.cat(parts)


def k_means_step(blocks_ND: Tensor, weights_ND: Tensor, codewords_CD: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest codeword of each block, (N,), and the codewords moved to the means of their blocks, (C, D).

    A codeword without blocks moves to one of the blocks with the largest errors, whose codes do not change yet.
    """
    codes_N = nearest(blocks_ND, weights_ND, codewords_CD)
    totals_CD = torch.zeros_like(codewords_CD).index_add_(0, codes_N, weights_ND)
    sums_CD = torch.zeros_like(codewords_CD).index_add_(0, codes_N, weights_ND * blocks_ND)
    moved_CD = torch.where(totals_CD > 0, sums_CD / totals_CD, codewords_CD)
    unused_U = (codes_N.bincount(minlength=len(codewords_CD)) == 0).nonzero().squeeze(1)
    if len(unused_U):
        errors_N = (weights_ND * (blocks_ND - moved_CD[codes_N]).square()).sum(1)
        worst_U = errors_N.topk(min(len(unused_U), len(errors_N))).indices
        moved_CD[unused_U[: len(worst_U)]] = blocks_ND[worst_U]
    return codes_N, moved_CD


def beam_search(blocks_ND: Tensor, weights_ND: Tensor, codewords_MCD: Tensor, codes_MN: Tensor, width: int) -> Tensor:
    """Codes (M, N) whose errors are at most those of the given codes, for given codebooks.

    A block's codes are chosen one codebook after the other; the `width` best choices so far are kept.
    """
    rows = max(1, _AT_ONCE // (codewords_MCD.shape[1] * width))
    parts = zip(blocks_ND.split(rows), weights_ND.split(rows), codes_MN.split(rows, dim=1), strict=True)
    return torch.cat([_searched(*part, codewords_MCD, width) for part in parts], dim=1)


def _searched(blocks_ND: Tensor, weights_ND: Tensor, given_MN: Tensor, codewords_MCD: Tensor, width: int) -> Tensor:
    left_NBD, codes_MNB = blocks_ND[:, None], given_MN[:, :, None][:0]
    for codewords_CD in codewords_MCD:
        weights_NBD = weights_ND[:, None].expand_as(left_NBD)
        factors = torch.cat([-2 * codewords_CD, codewords_CD.square()], dim=1).T
        changes_NBC = torch.cat([weights_NBD * left_NBD, weights_NBD], dim=2) @ factors
        errors_NBC = changes_NBC + (weights_NBD * left_NBD.square()).sum(2, keepdim=True)
        choices_NX = errors_NBC.flatten(1)
        best_NB = choices_NX.topk(min(width, choices_NX.shape[1]), largest=False).indices
        before_NB, code_NB = best_NB // len(codewords_CD), best_NB % len(codewords_CD)
        left_NBD = left_NBD.gather(1, before_NB[:, :, None].expand(-1, -1, blocks_ND.shape[1]))
        left_NBD = left_NBD - codewords_CD[code_NB]
        codes_MNB = torch.cat([codes_MNB.gather(2, before_NB.expand(len(codes_MNB), -1, -1)), code_NB[None]])
    errors_NB = (weights_ND[:, None] * left_NBD.square()).sum(2)
    best_N = errors_NB.argmin(1)
    found_MN = codes_MNB.gather(2, best_N[None, :, None].expand(len(codes_MNB), -1, -1)).squeeze(2)
    given_ND = blocks_ND - decoded(codewords_MCD, given_MN)
    return torch.where(errors_NB.amin(1) < (weights_ND * given_ND.square()).sum(1), found_MN, given_MN)


def sweep(blocks_ND: Tensor, weights_ND: Tensor, codewords_MCD: Tensor, codes_MN: Tensor) -> tuple[Tensor, Tensor]:
    """Codebooks and codes after a k-means step of each codebook on what the others leave."""
    codewords_MCD, codes_MN = codewords_MCD.clone(), codes_MN.clone()
    left_ND = blocks_ND - decoded(codewords_MCD, codes_MN)
    for book in range(len(codewords_MCD)):
        left_ND += codewords_MCD[book, codes_MN[book]]
        codes_MN[book], codewords_MCD[book] = k_means_step(left_ND, weights_ND, codewords_MCD[book])
        left_ND -= codewords_MCD[book, codes_MN[book]]
    return codewords_MCD, codes_MN


def decoded(codewords_MCD: Tensor, codes_MN: Tensor) -> Tensor:
    """The blocks (N, D) of codes: the sums of their codewords."""
    return torch.stack([book[codes] for book, codes in zip(codewords_MCD, codes_MN, strict=True)]).sum(0)


def additive_codes(
    blocks_ND: Tensor,
    weights_ND: Tensor,
    codebooks: int,
    codewords: int,
    iterations: int,
    beam: int,
    generator: torch.Generator,
    advance: Callable[[int], None] = lambda done: None,
) -> tuple[Tensor, Tensor]:
    """Codebooks (M, C, D) and codes (M, N) with a small weighted squared error of the blocks.

    Args:
        blocks_ND: The blocks.
        weights_ND: Weight of the squared error of each number, at least 0.
        codebooks: M.
        codewords: C.
        iterations: k-means steps of each codebook, and sweeps over all codebooks.
        beam: Width of the beam search.
        generator: Chooses the blocks that k-means starts from.
        advance: Called with the work done since its last call, in blocks; `work` is the sum.
    """
    count, size = blocks_ND.shape
    codewords_MCD = blocks_ND.new_zeros(codebooks, codewords, size)
    codes_MN = torch.zeros(codebooks, count, dtype=torch.int64)
    left_ND = blocks_ND.clone()

    for book in range(codebooks):
        started = left_ND[torch.randperm(count, generator=generator)[:codewords]]
        codewords_MCD[book, : len(started)] = started
        for _ in range(iterations):
            codes_MN[book], codewords_MCD[book] = k_means_step(left_ND, weights_ND, codewords_MCD[book])
            advance(count)
        left_ND -= codewords_MCD[book, codes_MN[book]]
    for _ in range(iterations):
        codes_MN = beam_search(blocks_ND, weights_ND, codewords_MCD, codes_MN, beam)
        codewords_MCD, codes_MN = sweep(blocks_ND, weights_ND, codewords_MCD, codes_MN)
        advance(count * codebooks * (1 + beam))
    return codewords_MCD, codes_MN


def work(blocks: int, codebooks: int, iterations: int, beam: int) -> int:
    """The work of `additive_codes`, in the units of its `advance`."""
    return blocks * codebooks * iterations * (2 + beam)
