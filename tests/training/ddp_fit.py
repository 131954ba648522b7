"""A program for the tests: fit and test every scheme on the digits, each on several numbers of processes.

The argument is the folder to write to. Each fit saves `<folder>/<scheme>.<processes>.<rank>`, each test the same with
`.test` appended, and each process that fails its traceback as `<folder>/<scheme>.<processes>.<rank>.error`.

PyTorch and Lightning are imported once; the processes of a fit are forked from this one.
"""

import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

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
    throughput,
)
from nernlit.data import Corrupted, DigitsDataModule
from nernlit.kernels import LayerFilter, Uniform
from nernlit.originals import Original
from nernlit.predictors import MLP, Codebooks
from nernlit.representation import Representation
from nernlit.training import (
    BaselineJoint,
    DecoupledDistill,
    Progressive,
    ReconOnly,
    ReconstructionPhase,
    Scheme,
    Sensitivity,
)
from tests.fakes import tiny_representation

#: Recon-only of layers whose kernels are shared out unevenly: of several sizes, or fewer than processes.
UNEVEN = {
    "mixed_mse": (["*"], "mse"),
    "mixed_rmse": (["*"], "rmse"),
    "six_kernels": (["depthwise"], "mse"),
}


#: Seconds after which a fit counts as hanging.
TIMEOUT = 120


class Fit(NamedTuple):
    scheme: str
    processes: int
    #: Kernels, and images, per process.
    batch_size: int


FITS = [
    *(
        Fit(scheme, processes, 64 // processes)
        for scheme in ("mse", "rmse", "decoupled", "moving", "joint", "progressive", "fisher")
        for processes in (1, 2)
    ),
    *(Fit(scheme, processes, 16 // processes) for scheme in ("mixed_mse", "mixed_rmse") for processes in (1, 2)),
    *(Fit("six_kernels", processes, 16 // processes) for processes in (1, 8)),
    Fit("poisoned", 2, 32),
]


class Record(L.Callback):
    """Keep what each process sampled, and its first predictor."""

    def __init__(self, fit: Fit, out: Path) -> None:
        self.fit, self.out = fit, out
        self.outcome: dict[str, object] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.outcome["start"] = [p.detach().clone() for p in pl_module.parameters() if p.requires_grad]

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, Scheme)
        rank, world_size = trainer.global_rank, trainer.world_size
        self.outcome["sampled"] = Uniform(self.fit.batch_size).indices(
            pl_module.norms_N, pl_module.seed, 0, rank, world_size
        )
        self.outcome["end"] = [p.detach().clone() for p in pl_module.parameters() if p.requires_grad]
        self.outcome["error_weights"] = pl_module.error_weights.table
        predictor = pl_module.representation.predictor
        self.outcome["codes"] = predictor.codes if isinstance(predictor, Codebooks) else None
        self.outcome["val"] = {name: float(value) for name, value in trainer.callback_metrics.items() if "val" in name}
        names = ("train/recon", "train/loss", "train/explained_power") if self.fit.scheme in UNEVEN else ()
        self.outcome["train"] = [float(trainer.callback_metrics[name]) for name in names]
        torch.save(self.outcome, f"{self.out}.{rank}")

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        tested = {name: float(value) for name, value in trainer.callback_metrics.items() if "test" in name}
        torch.save(tested, f"{self.out}.{trainer.global_rank}.test")


class PoisonTheSecond(L.Callback):
    """A NaN in the third batch of the second process."""

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: object, number: int
    ) -> None:
        if number == 2 and trainer.global_rank == 1:
            assert isinstance(pl_module, Scheme)
            pl_module.representation.target.fill_(torch.nan)


def sgd(params: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1)


def build(scheme: str, batch_size: int) -> Scheme:
    predictor = Codebooks(2, 3, move=0.05, move_rate=0.3) if scheme == "moving" else MLP(16)
    representation = Representation(Original("digits_resnet8", pretrained=True), predictor, order="none")
    sampling = Uniform(batch_size)
    if scheme in ("decoupled", "moving"):
        return DecoupledDistill(
            representation,
            optimizer=sgd,
            reconstruction=ReconstructionPhase(2, sampling=sampling),
            precision="fp32",
            temperature=4.0,
            ema=0.5 if scheme == "decoupled" else 0.0,
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
    if scheme == "fisher":
        return ReconOnly(representation, sgd, sampling=sampling, sensitivity=Sensitivity("fisher", num_images=16))
    if scheme == "poisoned":
        scheme = "mse"
    return ReconOnly(representation, sgd, sampling=sampling, loss=scheme)  # type: ignore[arg-type]


def run(fit: Fit, out: Path) -> None:
    """Fit and test in this process, together with the others of its group."""
    L.seed_everything(3, verbose=False)
    module = build(fit.scheme, fit.batch_size)
    # 1,437 * 0.0216 = 31 images: odd, so that a padding sampler would count one of them twice.
    on_images = module.trains_on_images
    data = DigitsDataModule(
        batch_size=fit.batch_size,
        train_on="images" if on_images else "none",
        steps_per_epoch=None if on_images else 5,
        val_share=0.0216,
        eval_batch_size=7,
        eval_sets=[Corrupted(["gaussian_noise", "contrast"], [3])],
    )
    callbacks = [AdversarialAccuracy(fgsm_255=[4], ifgsm_255=[4], steps=2), LowFrequencyEnergy(), LayerDifference()]
    callbacks += [RoundCheckpoint(), WeightsWriter(), Throughput(1), Record(fit, out)]
    callbacks += [ModelCheckpoint(f"{out}.checkpoints", monitor="val/acc", mode="max")]
    if fit.scheme == "poisoned":
        callbacks = [PoisonTheSecond()]
    trainer = L.Trainer(
        accelerator="cpu",
        devices=fit.processes,
        strategy="ddp" if fit.processes > 1 else "auto",
        max_epochs=1,
        limit_train_batches=5,
        logger=TensorBoardLogger(f"{out}.run", "", ""),
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
        default_root_dir=f"{out}.run",
    )
    trainer.fit(module, datamodule=data)
    if fit.scheme in UNEVEN:
        return
    trainer.test(module, datamodule=data, verbose=False)
    trainer.predict(module, datamodule=data)


def run_as(rank: int, fit: Fit, out: Path) -> None:
    os.environ["LOCAL_RANK"] = str(rank)  # tells Lightning that the processes of the group exist already
    try:
        run(fit, out)
    except BaseException:
        Path(f"{out}.{rank}.error").write_text(traceback.format_exc())
        raise


def main(folder: Path) -> None:
    forked = multiprocessing.get_context("fork")
    for fit in FITS:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free.getsockname()[1]))
        out = folder / f"{fit.scheme}.{fit.processes}"
        group = [forked.Process(target=run_as, args=(rank, fit, out)) for rank in range(fit.processes)]
        for process in group:
            process.start()
        for rank, process in enumerate(group):
            process.join(TIMEOUT)
            if process.is_alive():
                process.kill()
                Path(f"{out}.{rank}.error").write_text(f"still running after {TIMEOUT} s")


if __name__ == "__main__":
    torch.set_num_threads(1)
    throughput._SIDE = 64  # the time of a product of large matrices, on every process, tests nothing
    main(Path(sys.argv[1]))
