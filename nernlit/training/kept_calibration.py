"""The option `calibration_images`: kept tensors that are trained are calibrated on training images."""

from typing import Any, final

from lightning.pytorch import Trainer

from nernlit.errors import UsageError, require_at_least
from nernlit.representation import Representation, calibrate
from nernlit.training.sensitivity import require_training_images
from nernlit.utilities.processes import Processes


@final
class KeptCalibration:
    """Calibrates the kept tensors of a representation; see `nernlit.representation.calibrate`.

    Args:
        representation: The representation.
        num_images: Number of training images; 0 does not calibrate, None if the scheme cannot.
        trains_on_images: Whether the scheme trains on images, which has an effect on kept tensors, too.
        scheme: Name of the scheme's class, for messages.

    Raises:
        UsageError: If the kept tensors to train and the images do not go together.
    """

    def __init__(
        self, representation: Representation, num_images: int | None, trains_on_images: bool, scheme: str
    ) -> None:
        self.representation, self.num_images = representation, num_images or 0
        require_at_least(0, calibration_images=self.num_images)
        # Those of a .nern file may differ from the original's without being trained.
        tunes = any(value.requires_grad for value in representation.tuned.parameters())
        if tunes and not trains_on_images and not num_images:
            calibrating = "" if num_images is None else "pass --model.calibration_images 256, or "
            raise UsageError(
                f"tune_kept chooses tensors that only images have an effect on, and {scheme} uses none; "
                f"{calibrating}leave --model.representation.tune_kept out."
            )
        if num_images and not tunes:
            raise UsageError(
                f"calibration_images={num_images} has no effect: no kept tensors are chosen; pass "
                "--model.representation.tune_kept affine, or leave it out."
            )

    def require_images(self, data: Any) -> None:
        """Check that the datamodule has the training images that are needed.

        Raises:
            UsageError: If not.
        """
        if self.num_images:
            original = self.representation.original
            require_training_images("calibration_images", "leave it and tune_kept out", original, data)

    def run(self, trainer: Trainer, data: Any) -> None:
        """Calibrate, bitwise the same on all processes; does nothing without images."""
        if not self.num_images:
            return
        processes, tuned = Processes.from_trainer(trainer), self.representation.tuned
        # Always the same images: the values depend on the predictor alone, not on the run's seed.
        calibrate(self.representation, data.training_images(self.num_images, 0, processes), processes)
        if processes.world_size > 1:  # machines may round differently
            tuned.load_state_dict(trainer.strategy.broadcast(tuned.state_dict()))
