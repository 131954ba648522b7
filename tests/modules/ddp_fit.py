"""A program for the tests: fit and test on the digits with some processes, and save the outcome.

Arguments: processes, kernels a step and process, loss, file to write.
"""

import sys
from collections.abc import Iterable

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from nernlit.data import DigitsDataModule
from nernlit.kernels import Uniform
from nernlit.modules import ReconOnly
from nernlit.originals import Original
from nernlit.predictors import MLP
from nernlit.representation import Representation


class Record(L.Callback):
    """Keep what each process sampled, and its first predictor."""

    def __init__(self) -> None:
        self.outcome: dict[str, object] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.outcome["start"] = [p.detach().clone() for p in pl_module.parameters() if p.requires_grad]

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, ReconOnly)
        rank, world_size = trainer.global_rank, trainer.world_size
        self.outcome["sampled"] = pl_module.sampling.indices(pl_module.norms_N, pl_module.seed, 0, rank, world_size)
        self.outcome["end"] = [p.detach().clone() for p in pl_module.parameters() if p.requires_grad]
        self.outcome["val"] = {name: float(value) for name, value in trainer.callback_metrics.items() if "val" in name}
        torch.save(self.outcome, f"{sys.argv[4]}.{rank}")


def sgd(params: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1)


def main() -> None:
    processes, batch_size = int(sys.argv[1]), int(sys.argv[2])
    L.seed_everything(3, verbose=False)
    module = ReconOnly(
        Representation(Original("digits_resnet8", pretrained=True), MLP(16), order="none"),
        sgd,
        sampling=Uniform(batch_size),
        loss=sys.argv[3],  # type: ignore[arg-type]
    )
    # 1,437 * 0.0216 = 31 images: odd, so that a padding sampler would count one of them twice.
    data = DigitsDataModule(train_on="none", steps_per_epoch=5, val_share=0.0216, eval_batch_size=7)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=processes,
        strategy="ddp_spawn" if processes > 1 else "auto",
        max_epochs=1,
        use_distributed_sampler=False,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Record(), ModelCheckpoint(f"{sys.argv[4]}.checkpoints", monitor="val/acc", mode="max")],
    )
    trainer.fit(module, datamodule=data)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
