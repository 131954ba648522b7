"""Recon-only (arXiv 2407.00356, section 3.1): the predictor learns the original's kernels and sees no image.

A step predicts only the kernels that it sampled, so its cost does not depend on the network's size.
"""

from typing import Any, Literal, final

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from nernlit.kernels import Sampling, Uniform
from nernlit.losses import reconstruction_mse
from nernlit.modules.base import ReconstructionModule
from nernlit.representation import Representation


@final
class ReconOnly(ReconstructionModule):
    """Minimise the reconstruction error of sampled kernels, in units of the representation's scale.

    Args:
        representation: What is trained.
        optimizer: Makes the optimiser from the predictor's parameters.
        scheduler: Makes the schedule from the optimiser.
        sampling: Which kernels a step looks at; ours is uniform, NeRN's the `MagnitudeMix`.
        loss: `mse` (ours), or `rmse`, the root that NeRN's code takes.
    """

    def __init__(
        self,
        representation: Representation,
        optimizer: OptimizerCallable,
        scheduler: LRSchedulerCallable | None = None,
        sampling: Sampling | None = None,
        loss: Literal["mse", "rmse"] = "mse",
    ) -> None:
        super().__init__(representation, optimizer, scheduler)
        self.sampling = sampling or Uniform()
        self.loss = loss
        self.norms_N = representation.target.flatten(1).norm(dim=1).cpu()

    def loss_terms(self, batch: Any) -> dict[str, Tensor]:
        rows = self.sampling.indices(
            self.norms_N,
            self.seed,
            self.trainer.fit_loop.total_batch_idx,
            self.trainer.global_rank,
            self.trainer.world_size,
        ).to(self.device)
        representation = self.representation
        predicted = representation.kernels(rows) / representation.scale
        target = representation.target[rows] / representation.scale
        mask = representation.mask(rows)
        mse = reconstruction_mse(predicted, target, mask)
        power = reconstruction_mse(torch.zeros_like(target), target, mask)
        self.log("train/variance_explained", 1 - mse.detach() / power, prog_bar=True)
        if self.loss == "rmse":
            if self.trainer.world_size > 1:
                # The mean of the processes' roots is not the root of their mean.
                gathered = self.all_gather(mse, sync_grads=True)
                assert isinstance(gathered, Tensor)
                mse = gathered.mean()
            return {"recon": mse.sqrt()}
        return {"recon": mse}
