"""Additive quantization: a block is the sum of one codeword of each codebook (as in arXiv 2111.10320).

Residual k-means initializes the codebooks: each is fitted to the residual of the previous ones. Sweeps then improve all
of them: a beam search looks for better codes of each block, and each codebook in turn takes a k-means step on the
residual of all others (iterated conditional modes). Without a price of bits, no step of a sweep increases the weighted
squared error.

The codebooks of a large network are found on a sample of its blocks; then a beam search finds the codes of all blocks.

Optionally the rate is part of the cost (entropy-constrained vector quantization): the squared error plus a multiple of
the bits of each code. Rare codes take more bits in an entropy code.

Shapes: N blocks, S blocks of the sample, D numbers of a block, M codebooks, C codewords of each, B beam width,
X choices.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

#: Elements of the error matrix per chunk: 4 MiB, which fits in the CPU cache and keeps the call overhead small.
_CHUNK_ELEMENTS = 2**20
#: Blocks per update of the progress bar.
_BLOCKS_PER_UPDATE = 2**16


def code_costs(codes_N: Tensor, codewords: int, cost_per_bit: float) -> Tensor:
    """The cost of each code of a codebook, (C,) fp32: `cost_per_bit` times its code length, estimated from `codes_N`.

    Counts are smoothed by 0.5, so that unused codes have a finite cost.

    >>> code_costs(torch.tensor([0, 0, 0, 1]), codewords=2, cost_per_bit=1.0)
    tensor([0.5146, 1.7370])
    """
    counts_C = codes_N.bincount(minlength=codewords).float() + 0.5
    return -cost_per_bit * (counts_C / counts_C.sum()).log2()


def nearest(blocks_ND: Tensor, weights_ND: Tensor, codewords_CD: Tensor, costs_C: Tensor | float = 0.0) -> Tensor:
    """The index of the codeword with the smallest weighted squared error plus cost for each block, (N,) int64.

    >>> nearest(torch.tensor([[0.9, 9.0]]), torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 9.0], [1.0, 0.0]]))
    tensor([1])
    """
    rows = max(1, _CHUNK_ELEMENTS // len(codewords_CD))
    parts = zip(blocks_ND.split(rows), weights_ND.split(rows), strict=True)
    return torch.cat([_smallest(_errors(*part, codewords_CD, costs_C), 1) for part in parts]).squeeze(1)


def _errors(
    blocks_ND: Tensor,
    weights_ND: Tensor,
    codewords_CD: Tensor,
    costs_C: Tensor | float,
    previous_cost_N1: Tensor | float = 0.0,
) -> Tensor:
    """The weighted squared error of each block with each codeword plus the costs, (N, C), by one matrix product.

    Args:
        blocks_ND: The blocks.
        weights_ND: Weight of the squared error of each number.
        codewords_CD: The codewords of one codebook.
        costs_C: The cost of each of its codes; see `code_costs`.
        previous_cost_N1: The cost of the codes that were already chosen in previous codebooks.
    """
    # sum w (x - c)^2 = sum w x^2 - 2 sum w x c + sum w c^2
    weighted_ND = weights_ND * blocks_ND
    powers_N1 = (weighted_ND * blocks_ND).sum(1, keepdim=True)
    ones_C1, ones_N1 = torch.ones_like(codewords_CD[:, :1]), torch.ones_like(powers_N1)
    costs_C1 = ones_C1 * torch.as_tensor(costs_C).to(ones_C1).view(-1, 1)
    factors = torch.cat([ones_C1, -2 * codewords_CD, codewords_CD.square(), costs_C1], dim=1)
    return torch.cat([powers_N1 + previous_cost_N1, weighted_ND, weights_ND, ones_N1], dim=1) @ factors.T


def _smallest(values_NX: Tensor, count: int) -> Tensor:
    """The columns of the `count` smallest values in each row, (N, count), in any order."""
    if values_NX.device.type != "cpu":
        return values_NX.topk(count, dim=1, largest=False).indices
    # numpy's vectorized searches take a quarter of the time of torch's.
    if count == 1:
        return torch.from_numpy(values_NX.numpy().argmin(1, keepdims=True))
    choices = values_NX.shape[1]
    size = next(size for size in (16, 8, 4, 2, 1) if choices % size == 0 and (size == 1 or size**2 * count <= choices))
    if size == 1:
        return torch.from_numpy(np.argpartition(values_NX.numpy(), count - 1, axis=1)[:, :count])
    # The `count` smallest values of a row are in the `count` groups with the smallest minima.
    groups_NX = _smallest(values_NX.unflatten(1, (size, -1)).amin(1), count)
    members_NX = (groups_NX[:, None] + torch.arange(0, choices, choices // size)[:, None]).flatten(1)
    return members_NX.gather(1, _smallest(values_NX.gather(1, members_NX), count))


def k_means_step(
    blocks_ND: Tensor, weights_ND: Tensor, codewords_CD: Tensor, costs_C: Tensor | float = 0.0
) -> tuple[Tensor, Tensor]:
    """The nearest codeword of each block, (N,), and the codewords moved to the means of their blocks, (C, D).

    A codeword without blocks moves to one of the blocks with the largest errors, whose codes do not change yet.
    """
    codes_N = nearest(blocks_ND, weights_ND, codewords_CD, costs_C)
    totals_CD = torch.zeros_like(codewords_CD).index_add_(0, codes_N, weights_ND)
    sums_CD = torch.zeros_like(codewords_CD).index_add_(0, codes_N, weights_ND * blocks_ND)
    moved_CD = torch.where(totals_CD > 0, sums_CD / totals_CD, codewords_CD)
    unused_U = (codes_N.bincount(minlength=len(codewords_CD)) == 0).nonzero().squeeze(1)
    if len(unused_U):
        errors_N = (weights_ND * (blocks_ND - moved_CD[codes_N]).square()).sum(1)
        worst_U = errors_N.topk(min(len(unused_U), len(errors_N))).indices
        moved_CD[unused_U[: len(worst_U)]] = blocks_ND[worst_U]
    return codes_N, moved_CD


def beam_search(
    blocks_ND: Tensor,
    weights_ND: Tensor,
    codewords_MCD: Tensor,
    codes_MN: Tensor,
    width: int,
    costs_MC: Tensor | None = None,
) -> Tensor:
    """Codes (M, N) whose errors and costs are at most those of the given codes, for given codebooks.

    A block's codes are chosen one codebook after the other; the `width` best choices so far are kept.
    """
    rows = max(1, _CHUNK_ELEMENTS // (codewords_MCD.shape[1] * width))
    if costs_MC is None:
        costs_MC = codewords_MCD.new_zeros(codewords_MCD.shape[:2])
    parts = zip(blocks_ND.split(rows), weights_ND.split(rows), codes_MN.split(rows, dim=1), strict=True)
    return torch.cat([_search_chunk(*part, codewords_MCD, width, costs_MC) for part in parts], dim=1)


def _search_chunk(
    blocks_ND: Tensor, weights_ND: Tensor, initial_MN: Tensor, codewords_MCD: Tensor, width: int, costs_MC: Tensor
) -> Tensor:
    residual_NBD, codes_MNB = blocks_ND[:, None], initial_MN[:, :, None][:0]
    cost_NB = blocks_ND.new_zeros(len(blocks_ND), 1)
    for book, (codewords_CD, costs_C) in enumerate(zip(codewords_MCD, costs_MC, strict=True)):
        weights_NBD = weights_ND[:, None].expand(-1, residual_NBD.shape[1], -1)
        flat = residual_NBD.flatten(0, 1), weights_NBD.flatten(0, 1), codewords_CD, costs_C, cost_NB.view(-1, 1)
        errors_NX = _errors(*flat).view(len(blocks_ND), -1)
        last = book == len(codewords_MCD) - 1
        best_NB = _smallest(errors_NX, 1 if last else min(width, errors_NX.shape[1]))
        parent_NB, code_NB = best_NB // len(codewords_CD), best_NB % len(codewords_CD)
        residual_NBD = residual_NBD.gather(1, parent_NB[:, :, None].expand(-1, -1, blocks_ND.shape[1]))
        residual_NBD = residual_NBD - codewords_CD[code_NB]
        cost_NB = cost_NB.gather(1, parent_NB) + costs_C[code_NB]
        codes_MNB = torch.cat([codes_MNB.gather(2, parent_NB.expand(len(codes_MNB), -1, -1)), code_NB[None]])
    found_N = (weights_ND * residual_NBD.squeeze(1).square()).sum(1) + cost_NB.squeeze(1)
    given_N = (weights_ND * (blocks_ND - decoded(codewords_MCD, initial_MN)).square()).sum(1)
    given_N = given_N + costs_MC.gather(1, initial_MN).sum(0)
    return torch.where(found_N < given_N, codes_MNB.squeeze(2), initial_MN)


def sweep(
    blocks_ND: Tensor, weights_ND: Tensor, codewords_MCD: Tensor, codes_MN: Tensor, cost_per_bit: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Codebooks (M, C, D) and codes (M, N) after one k-means step of each codebook on the residual of all others."""
    codewords_MCD, codes_MN = codewords_MCD.clone(), codes_MN.clone()
    residual_ND = blocks_ND - decoded(codewords_MCD, codes_MN)
    for book in range(len(codewords_MCD)):
        residual_ND += codewords_MCD[book, codes_MN[book]]
        costs_C = code_costs(codes_MN[book], codewords_MCD.shape[1], cost_per_bit)
        codes_MN[book], codewords_MCD[book] = k_means_step(residual_ND, weights_ND, codewords_MCD[book], costs_C)
        residual_ND -= codewords_MCD[book, codes_MN[book]]
    return codewords_MCD, codes_MN


def decoded(codewords_MCD: Tensor, codes_MN: Tensor) -> Tensor:
    """The blocks (N, D) of codes: the sums of their codewords."""
    blocks_ND = codewords_MCD[0, codes_MN[0]]
    for codewords_CD, codes_N in zip(codewords_MCD[1:], codes_MN[1:], strict=True):
        blocks_ND += codewords_CD[codes_N]
    return blocks_ND


def additive_codes(
    blocks_ND: Tensor,
    weights_ND: Tensor,
    codebooks: int,
    codewords: int,
    iterations: int,
    beam: int,
    sample: int,
    generator: torch.Generator,
    advance: Callable[[int], None] = lambda done: None,
    price: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Codebooks (M, C, D) and codes (M, N) with a small weighted squared error of the blocks.

    Args:
        blocks_ND: The blocks.
        weights_ND: Weight of the squared error of each number, at least 0.
        codebooks: M.
        codewords: C.
        iterations: k-means steps of each codebook, and sweeps over all codebooks.
        beam: Width of the beam search.
        sample: Number of blocks, chosen at random, that the codebooks are found on; all blocks if there are fewer.
        generator: Chooses the sample and the blocks that k-means starts from.
        advance: Called with the work done since its last call; `total_work` is the sum.
        price: What a bit of a code counts beside the squared errors, as a share of the blocks' mean weighted power.
    """
    cost_per_bit = price * float((weights_ND * blocks_ND.square()).sum()) / max(len(blocks_ND), 1)
    codes_MN = torch.zeros(codebooks, len(blocks_ND), dtype=torch.int64)
    chosen_S = torch.randperm(len(blocks_ND), generator=generator)[:sample]
    options = codebooks, codewords, iterations, beam, cost_per_bit, advance
    codewords_MCD, codes_MN[:, chosen_S] = _codebooks(blocks_ND[chosen_S], weights_ND[chosen_S], *options)
    costs_MC = all_code_costs(codes_MN[:, chosen_S], codewords, cost_per_bit)
    start = 0
    for blocks, weights in zip(blocks_ND.split(_BLOCKS_PER_UPDATE), weights_ND.split(_BLOCKS_PER_UPDATE), strict=True):
        rows = slice(start, start + len(blocks))
        codes_MN[:, rows] = beam_search(blocks, weights, codewords_MCD, codes_MN[:, rows], beam, costs_MC)
        start += len(blocks)
        advance(len(blocks) * codebooks * beam)
    return codewords_MCD, codes_MN


def all_code_costs(codes_MN: Tensor, codewords: int, cost_per_bit: float) -> Tensor:
    """The costs of the codes of all codebooks, (M, C)."""
    return torch.stack([code_costs(codes_N, codewords, cost_per_bit) for codes_N in codes_MN])


def _codebooks(
    blocks_SD: Tensor,
    weights_SD: Tensor,
    codebooks: int,
    codewords: int,
    iterations: int,
    beam: int,
    cost_per_bit: float,
    advance: Callable[[int], None],
) -> tuple[Tensor, Tensor]:
    """Codebooks (M, C, D) and codes (M, S) of blocks in random order."""
    count, size = blocks_SD.shape
    codewords_MCD = blocks_SD.new_zeros(codebooks, codewords, size)
    codes_MS = torch.zeros(codebooks, count, dtype=torch.int64)
    residual_SD = blocks_SD.clone()
    for book in range(codebooks):
        initial_CD = residual_SD.roll(-book * codewords, 0)[:codewords]  # other blocks for each codebook
        codewords_MCD[book, : len(initial_CD)] = initial_CD
        costs_C: Tensor | float = 0.0
        for _ in range(iterations):
            codes_MS[book], codewords_MCD[book] = k_means_step(residual_SD, weights_SD, codewords_MCD[book], costs_C)
            costs_C = code_costs(codes_MS[book], codewords, cost_per_bit)
            advance(count)
        residual_SD -= codewords_MCD[book, codes_MS[book]]
    for _ in range(iterations):
        costs_MC = all_code_costs(codes_MS, codewords, cost_per_bit)
        codes_MS = beam_search(blocks_SD, weights_SD, codewords_MCD, codes_MS, beam, costs_MC)
        codewords_MCD, codes_MS = sweep(blocks_SD, weights_SD, codewords_MCD, codes_MS, cost_per_bit)
        advance(count * codebooks * (1 + beam))
    return codewords_MCD, codes_MS


def total_work(blocks: int, codebooks: int, iterations: int, beam: int, sample: int) -> int:
    """The work of `additive_codes`, in the units of its `advance`: blocks that are compared with a codebook."""
    return codebooks * (min(blocks, sample) * iterations * (2 + beam) + blocks * beam)
