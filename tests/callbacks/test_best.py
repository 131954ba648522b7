from pathlib import Path

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from nernlit.callbacks import BestCheckpoint
from nernlit.cli.main import run
from nernlit.errors import UsageError
from tests.fakes import QUICK


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


def test_a_resumed_fit_keeps_its_best_checkpoint_however_its_folder_is_given() -> None:
    line = ["fit", *QUICK, "--trainer.logger.init_args.name=moved"]
    run([*line, "--trainer.max_epochs=2"])
    path = Path("runs/moved/version_0/checkpoints/best.ckpt")
    before = path.read_bytes()
    # With a learning rate of 0 nothing becomes better; of equal accuracies the later one is kept.
    content = torch.load(path.parent / "last.ckpt", weights_only=True)
    (key,) = (key for key in content["callbacks"] if key.startswith("BestCheckpoint"))
    content["callbacks"][key] |= {"best_model_score": torch.tensor(2.0), "kth_value": torch.tensor(2.0)}
    best = content["callbacks"][key]["best_k_models"]
    content["callbacks"][key]["best_k_models"] = dict.fromkeys(best, torch.tensor(2.0))
    torch.save(content, path.parent / "last.ckpt")
    Path("elsewhere").mkdir()
    Path("runs/moved").rename("elsewhere/moved")
    folder = f"--trainer.logger.init_args.save_dir={Path('elsewhere').absolute()}"
    cli = run([*line, folder, "--trainer.max_epochs=4", "--ckpt_path=last"])
    place = Path("elsewhere/moved/version_0/checkpoints/best.ckpt")
    assert place.read_bytes() == before
    (callback,) = (each for each in cli.trainer.checkpoint_callbacks if isinstance(each, BestCheckpoint))
    assert float(callback.best_model_score or 0) == 2.0
    assert Path(callback.best_model_path) == place.absolute()


@pytest.mark.parametrize("count", [2, -1])
def test_checkpoints_that_would_have_one_name_are_refused(count: int) -> None:
    message = rf"save_top_k={count}: all of these checkpoints would be named best\.ckpt; pass a filename with"
    with pytest.raises(UsageError, match=message):
        BestCheckpoint(save_top_k=count, enable_version_counter=False)
    BestCheckpoint("best-{step}", save_top_k=count, enable_version_counter=False)
    BestCheckpoint(save_top_k=0, enable_version_counter=False)
