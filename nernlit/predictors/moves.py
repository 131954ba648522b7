"""Updates of the discrete codes during training, from accumulated gradients.

An optimizer cannot change integers, and replacing all codes by those nearest to some trained weights changes too much
at once. Here each block has a drift: the sum of its normalized negative gradients since its codes last changed, which
is where plain gradient descent would have taken it. A step looks for codes nearer to block plus drift, and changes the
blocks that gain most, at most a given share of all. The remaining difference is kept as the new drift, as in
error feedback (gradient compression). (PV-tuning, arXiv 2405.14852, changes few blocks at a time for the same reason;
it has no drift.)

Shapes: R blocks of the representation, N of them predicted, D numbers of a block, M codebooks, C codewords of each, S
sets of codebooks.
"""

from collections.abc import Callable, Mapping
from typing import final

import torch
from torch import Tensor

from nernlit.predictors.additive import all_code_costs, decoded, nearest
from nernlit.utilities.constants import WithConstants


@final
class CodeMoves(WithConstants):
    """The drift of all blocks, and the codes that it changes.

    The tables take memory from the first training step on. Blocks and gradients are in units of the codewords.

    Args:
        share: Largest share of the blocks whose codes change per step.
        rate: Length of a step of the drift at the highest learning rate: the root mean square over a block's numbers.
        price: What a bit of a code counts beside the squared errors, as a share of the blocks' mean power.
    """

    gradient: Tensor
    drift: Tensor

    def __init__(self, share: float, rate: float, price: float = 0.0) -> None:
        super().__init__()
        self.share, self.rate, self.price = share, rate, price
        self._start(torch.zeros(0, 0))

    def watch(self, blocks_ND: Tensor, rows_N: Tensor, count: int) -> None:
        """Note the gradients of predicted blocks in the coming backward pass.

        Args:
            blocks_ND: The blocks, before they are scaled.
            rows_N: Which of the R blocks they are.
            count: R.
        """
        if not len(self.drift):
            self._start(blocks_ND.new_zeros(count, blocks_ND.shape[1], dtype=torch.float32))
        blocks_ND.register_hook(lambda gradient_ND: self._note(gradient_ND, rows_N))

    def _start(self, zeros_RD: Tensor) -> None:
        self.set_constant("gradient", zeros_RD)
        self.set_constant("drift", zeros_RD.clone())

    def _note(self, gradient_ND: Tensor, rows_N: Tensor) -> None:
        self.gradient.index_add_(0, rows_N, gradient_ND.float())

    @torch.no_grad()
    def step(
        self,
        codes_RM: Tensor,
        codewords_SMCD: Tensor,
        sets_R: Tensor,
        relative_rate: float,
        mean: Callable[[Tensor], Tensor] = torch.positive,
    ) -> int:
        """Add the noted gradients to the drift and change codes in place.

        A number of a block that never had a gradient has no weight in the choice of codes: it is outside the crop of a
        smaller kernel.

        Args:
            codes_RM: The codes.
            codewords_SMCD: The codebooks.
            sets_R: The number of each block's codebooks.
            relative_rate: The learning rate as a share of the highest; it scales the drift's steps.
            mean: Averages a tensor over all processes.

        Returns:
            The number of blocks whose codes changed.
        """
        if not len(self.drift):
            return 0
        gradient_RD = mean(self.gradient)
        lengths_R = gradient_RD.norm(dim=1) / gradient_RD.count_nonzero(1).clamp_min(1).sqrt()
        units_RD = gradient_RD / torch.where(lengths_R > 0, lengths_R, 1)[:, None]
        self.drift.sub_(units_RD, alpha=self.rate * relative_rate)
        self.gradient.zero_()
        weights_RD = (self.drift != 0).to(self.drift)

        new_RM, before_RD, after_RD = codes_RM.long(), torch.empty_like(self.drift), torch.empty_like(self.drift)
        saved_R = self.drift.new_zeros(len(self.drift))  # the costs of the old codes minus those of the new ones
        for number, codewords_MCD in enumerate(codewords_SMCD.float()):
            own = (sets_R == number).nonzero().squeeze(1)
            old_MN = new_RM[own].T
            before_RD[own] = decoded(codewords_MCD, old_MN)
            cost_per_bit = self.price * float(before_RD[own].square().sum()) / len(own)
            costs_MC = all_code_costs(old_MN, codewords_MCD.shape[1], cost_per_bit)
            target_ND = before_RD[own] + self.drift[own]
            new_MN = nearer_codes(target_ND, weights_RD[own], codewords_MCD, old_MN, costs_MC)
            new_RM[own], after_RD[own] = new_MN.T, decoded(codewords_MCD, new_MN)
            saved_R[own] = (costs_MC.gather(1, old_MN) - costs_MC.gather(1, new_MN)).sum(0)
        residual_RD = (before_RD + self.drift - after_RD) * weights_RD
        gain_R = (weights_RD * self.drift.square()).sum(1) - residual_RD.square().sum(1) + saved_R
        gain_R = torch.where((new_RM != codes_RM).any(1) & weights_RD.any(1), gain_R, 0)
        best = gain_R.topk(max(1, int(self.share * len(gain_R))))
        moved = best.indices[best.values > 0]
        codes_RM[moved] = new_RM[moved].to(codes_RM)
        self.drift[moved] = residual_RD[moved]
        return len(moved)

    def state(self) -> dict[str, Tensor]:
        """What the coming steps depend on; empty before the first gradient."""
        return {"drift": self.drift} if len(self.drift) else {}

    def load_state(self, state: Mapping[str, Tensor], device: torch.device) -> None:
        """Continue from what `state` returned; start again if it is empty."""
        self._start(torch.zeros_like(state["drift"], device=device) if state else torch.zeros(0, 0, device=device))
        if state:
            self.drift.copy_(state["drift"])


def nearer_codes(
    blocks_ND: Tensor, weights_ND: Tensor, codewords_MCD: Tensor, codes_MN: Tensor, costs_MC: Tensor
) -> Tensor:
    """Codes (M, N) with at most the weighted error and cost of the given ones: each codebook's best in turn."""
    codes_MN, residual_ND = codes_MN.clone(), blocks_ND - decoded(codewords_MCD, codes_MN)
    for book, codewords_CD in enumerate(codewords_MCD):
        residual_ND = residual_ND + codewords_CD[codes_MN[book]]
        codes_MN[book] = nearest(residual_ND, weights_ND, codewords_CD, costs_MC[book])
        residual_ND = residual_ND - codewords_CD[codes_MN[book]]
    return codes_MN
