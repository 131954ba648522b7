"""Recon-only (arXiv 2407.00356, section 3.1): the predictor learns the original's kernels, without images.

A step predicts only the sampled kernels, so its cost does not depend on the size of the network.
"""

from typing import final

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable

from nernlit.kernels import Sampling
from nernlit.representation import Representation
from nernlit.training.objectives import Reconstruction, ReconstructionLoss
from nernlit.training.optimization import refuse_averaging
from nernlit.training.rate import Rate
from nernlit.training.recovery import OnDivergence
from nernlit.training.scheme import Precision, Scheme
from nernlit.training.sensitivity import NO_SENSITIVITY, Sensitivity
from nernlit.training.stages import Stage


@final
class ReconOnly(Scheme):
    """One stage: reconstruction.

    Args:
        representation: The representation to train.
        optimizer: Creates the optimizer from the predictor's parameters.
        scheduler: Creates the learning-rate schedule from the optimizer.
        sampling: Chooses the kernels of each step; uniform by default, `MagnitudeMix` for NeRN's.
        loss: `mse`, or `rmse` as in NeRN's code.
        precision: Precision of the predictor in training steps, `bf16` or `fp32`.
        rate: The price of bits in the loss, for a quantized representation.
        sensitivity: How much the error of each weight counts.
        on_divergence: `stop`, or `restart` from the last good state with half the learning rate; see `Scheme`.
        calibration_images: Number of training images, without labels, that the kept tensors of `tune_kept` are
            calibrated on before each validation and at the end; see `nernlit.representation.calibrate`.
    """

    def __init__(
        self,
        representation: Representation,
        optimizer: OptimizerCallable,
        scheduler: LRSchedulerCallable | None = None,
        sampling: Sampling | None = None,
        loss: ReconstructionLoss = "mse",
        precision: Precision = "fp32",
        rate: Rate | None = None,
        sensitivity: Sensitivity = NO_SENSITIVITY,
        on_divergence: OnDivergence = "stop",
        calibration_images: int = 0,
    ) -> None:
        stage = Stage(Reconstruction(sampling, loss), optimizer, scheduler)
        options = sensitivity, on_divergence, calibration_images
        super().__init__(representation, [stage], precision, None, rate, *options)

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit" and self.calibration.num_images:
            kept = "tensors that are calibrated for the predictor's last values (calibration_images)"
            refuse_averaging(self.trainer, f"{kept}; pass calibration_images: 0 and tune_kept: none")

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self._calibrated_step = -1  # of this run; an earlier one may have had the same steps

    def on_validation_start(self) -> None:
        super().on_validation_start()
        if self.trainer.state.fn == "fit" and not self.trainer.sanity_checking:
            self._calibrate_once()

    def on_train_epoch_end(self) -> None:
        super().on_train_epoch_end()
        if self.trainer.should_stop:  # for fits without validation
            self._calibrate_once()

    def _calibrate_once(self) -> None:
        if self._calibrated_step != self.trainer.global_step:
            self.calibrate()
            self._calibrated_step = self.trainer.global_step
