from pathlib import Path

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from nernlit.callbacks import BestCheckpoint


class Scored(L.LightningModule):
    """Reports given accuracies, an epoch each."""

    def __init__(self, scores: list[float]) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.scores = scores

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.weight.sum()

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.log("val/acc", self.scores[self.current_epoch])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1.0)


@pytest.mark.parametrize(("scores", "best"), [([0.5, 0.9, 0.9, 0.7], 2), ([0.9, 0.5], 0), ([0.1, 0.2], 1)])
def test_the_best_is_kept_and_of_equals_the_later(scores: list[float], best: int, tmp_path: Path) -> None:
    loader = DataLoader([torch.zeros(1)], batch_size=None)
    trainer = L.Trainer(
        max_epochs=len(scores),
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[BestCheckpoint(dirpath=tmp_path)],
    )
    trainer.fit(Scored(scores), loader, loader)
    assert [path.name for path in tmp_path.iterdir()] == ["best.ckpt"]
    assert torch.load(tmp_path / "best.ckpt", weights_only=True)["epoch"] == best
