"""The data module without images, which `data: null` selects."""

from typing import Any, final

from torch.utils.data import DataLoader

from nernlit.data.base import ImageDataModule, Split, refuse_overfitting
from nernlit.data.sources import ImageSource
from nernlit.errors import DataError


@final
class NoImages(ImageDataModule):
    """Training steps without images, for Recon-only and Progressive; evaluations measure the weights, not accuracies.

    Args:
        steps_per_epoch: Training steps per epoch.
    """

    has_images = False

    def __init__(self, steps_per_epoch: int = 250) -> None:
        super().__init__(train_on="none", steps_per_epoch=steps_per_epoch)

    def setup(self, stage: str) -> None:
        """Nothing to read."""
        refuse_overfitting(self.trainer)

    def build(self, split: Split) -> ImageSource | None:
        raise DataError(f"`data: null` has no {split} images; name the data (--data CLASS and its options).")

    def val_dataloader(self) -> DataLoader[Any]:
        """A single empty batch, so that the weights are measured."""
        return self.predict_dataloader()

    def test_dataloader(self) -> list[DataLoader[Any]]:
        """A single empty batch, so that the weights are measured."""
        return [self.predict_dataloader()]
