"""Recon-only (arXiv 2407.00356, section 3.1): the predictor learns the original's kernels and sees no image.

A step predicts only the kernels that it sampled, so its cost does not depend on the network's size.
"""

from typing import final

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable

from nernlit.kernels import Sampling
from nernlit.representation import Representation
from nernlit.training.objectives import Reconstruction, ReconstructionLoss
from nernlit.training.scheme import Precision, Scheme
from nernlit.training.stages import Stage


@final
class ReconOnly(Scheme):
    """One stage: reconstruction.

    Args:
        representation: What is trained.
        optimizer: Makes the optimizer from the predictor's parameters.
        scheduler: Makes the schedule from the optimizer.
        sampling: Which kernels a step looks at; ours is uniform, NeRN's the `MagnitudeMix`.
        loss: `mse` (ours), or `rmse`, the root that NeRN's code takes.
        precision: Of the predictor in training steps, `bf16` or `fp32`.
    """

    def __init__(
        self,
        representation: Representation,
        optimizer: OptimizerCallable,
        scheduler: LRSchedulerCallable | None = None,
        sampling: Sampling | None = None,
        loss: ReconstructionLoss = "mse",
        precision: Precision = "fp32",
    ) -> None:
        stage = Stage(Reconstruction(sampling, loss), optimizer, scheduler)
        super().__init__(representation, [stage], precision)
