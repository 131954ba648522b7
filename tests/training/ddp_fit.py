"""A program for the tests: fit and test on the digits with some processes, and save the outcome.

Arguments: processes, batch size a process (of kernels, and of images), scheme, file to write.
"""

import sys
from collections.abc import Iterable

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger

from nernlit.callbacks import (
    AdversarialAccuracy,
    LayerDifference,
    LowFrequencyEnergy,
    RoundCheckpoint,
    Throughput,
    WeightsWriter,
)
from nernlit.data import Corrupted, DigitsDataModule
from nernlit.kernels import LayerFilter, Uniform
from nernlit.originals import Original
from nernlit.predictors import MLP
from nernlit.representation import Representation
from nernlit.training import BaselineJoint, DecoupledDistill, Progressive, ReconOnly, ReconstructionModule
from nernlit.training.distilling import DistillingModule
from tests.fakes import tiny_representation

#: Recon-only of layers whose kernels are shared out unevenly: of several sizes, or fewer than processes.
UNEVEN = {
    "mixed_mse": (["*"], "mse"),
    "mixed_rmse": (["*"], "rmse"),
    "six_kernels": (["depthwise"], "mse"),
}


class Record(L.Callback):
    """Keep what each process sampled, and its first predictor."""

    def __init__(self) -> None:
        self.outcome: dict[str, object] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.outcome["start"] = [p.detach().clone() for p in pl_module.parameters() if p.requires_grad]

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, ReconstructionModule)
        rank, world_size = trainer.global_rank, trainer.world_size
        self.outcome["sampled"] = Uniform(int(sys.argv[2])).indices(
            pl_module.norms_N, pl_module.seed, 0, rank, world_size
        )
        self.outcome["end"] = [p.detach().clone() for p in pl_module.parameters() if p.requires_grad]
        self.outcome["val"] = {name: float(value) for name, value in trainer.callback_metrics.items() if "val" in name}
        names = ("train/recon", "train/loss", "train/explained_power")
        self.outcome["train"] = [float(trainer.callback_metrics[name]) for name in names if sys.argv[3] in UNEVEN]
        torch.save(self.outcome, f"{sys.argv[4]}.{rank}")

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        tested = {name: float(value) for name, value in trainer.callback_metrics.items() if "test" in name}
        torch.save(tested, f"{sys.argv[4]}.test.{trainer.global_rank}")


class PoisonTheSecond(L.Callback):
    """A NaN in the third batch of the second process."""

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: object, number: int
    ) -> None:
        if number == 2 and trainer.global_rank == 1:
            assert isinstance(pl_module, ReconstructionModule)
            pl_module.representation.target.fill_(torch.nan)


def sgd(params: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1)


def build(scheme: str, batch_size: int) -> ReconstructionModule:
    representation = Representation(Original("digits_resnet8", pretrained=True), MLP(16), order="none")
    sampling = Uniform(batch_size)
    if scheme == "decoupled":
        return DecoupledDistill(
            representation, optimizer=sgd, recon_steps=2, recon_sampling=sampling, precision="fp32", temperature=4.0
        )
    if scheme == "joint":
        # Processes share the kernels of a step, so that their number is not a process's but the step's.
        return BaselineJoint(representation, sgd, sampling=Uniform(64), feature_weight=1e-2, kd_weight=1.0)
    if scheme == "progressive":
        return Progressive(representation, optimizer=sgd, sampling=sampling, rounds=1, trials=2)
    if scheme in UNEVEN:
        layers, loss = UNEVEN[scheme]
        few = tiny_representation(layers=LayerFilter(layers))
        return ReconOnly(few, sgd, sampling=sampling, loss=loss)  # type: ignore[arg-type]
    if scheme == "poisoned":
        scheme = "mse"
    return ReconOnly(representation, sgd, sampling=sampling, loss=scheme)  # type: ignore[arg-type]


def main() -> None:
    processes, batch_size = int(sys.argv[1]), int(sys.argv[2])
    L.seed_everything(3, verbose=False)
    module = build(sys.argv[3], batch_size)
    # 1,437 * 0.0216 = 31 images: odd, so that a padding sampler would count one of them twice.
    on_images = isinstance(module, DistillingModule)
    data = DigitsDataModule(
        batch_size=batch_size,
        train_on="images" if on_images else "none",
        steps_per_epoch=5,
        val_share=0.0216,
        eval_batch_size=7,
        eval_sets=[Corrupted(["gaussian_noise", "contrast"], [3])],
    )
    callbacks = [AdversarialAccuracy(fgsm_255=[4], ifgsm_255=[4], steps=2), LowFrequencyEnergy(), LayerDifference()]
    callbacks += [RoundCheckpoint(), WeightsWriter(), Throughput(1), Record()]
    callbacks += [ModelCheckpoint(f"{sys.argv[4]}.checkpoints", monitor="val/acc", mode="max")]
    if sys.argv[3] == "poisoned":
        callbacks = [PoisonTheSecond()]
    trainer = L.Trainer(
        accelerator="cpu",
        devices=processes,
        strategy="ddp_spawn" if processes > 1 else "auto",
        max_epochs=1,
        limit_train_batches=5,
        use_distributed_sampler=False,
        logger=TensorBoardLogger(f"{sys.argv[4]}.run", "", ""),
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
        default_root_dir=f"{sys.argv[4]}.run",
    )
    trainer.fit(module, datamodule=data)
    if sys.argv[3] in UNEVEN:
        return
    trainer.test(module, datamodule=data, verbose=False)
    trainer.predict(module, datamodule=data)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
