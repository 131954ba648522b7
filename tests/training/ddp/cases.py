"""The cases, by name. Each returns what its process is to save."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger

from nernlit.callbacks import (
    AdversarialAccuracy,
    BestCheckpoint,
    DurableCheckpointIO,
    LayerDifference,
    LearningRate,
    LowFrequencyEnergy,
    RepresentationFigures,
    RoundCheckpoint,
    Summary,
    Throughput,
    ValidationLog,
    WeightsWriter,
)
from nernlit.data import Corrupted
from nernlit.errors import NernlitError
from nernlit.kernels import LayerFilter, Uniform
from nernlit.training import Rate, ReconOnly, Scheme, Sensitivity
from tests.fakes import in_double, tiny_representation
from tests.training.ddp.fits import STEPS, fit, images, representation, scheme, sgd, trainer_of
from tests.training.ddp.group import Group

SCHEMES = ("recon_only", "baseline_joint", "decoupled_distill", "progressive")


def matrix(name: str, predictor: str, group: Group) -> Any:
    """A short fit in double precision, so that gradients can be compared closely."""
    rate = {"rate": Rate(weight=0.1)} if predictor.endswith("_quantized") and name != "progressive" else {}
    return in_double_fit(name, predictor, group, **rate)


def in_double_fit(
    name: str,
    predictor: str,
    group: Group,
    data: dict[str, Any] | None = None,
    represented: dict[str, Any] | None = None,
    trainer: dict[str, Any] | None = None,
    **options: Any,
) -> Any:
    L.seed_everything(3, verbose=False)
    module = scheme(name, in_double(representation(predictor, **represented or {})), group.batch_size, **options)
    return fit(module, images(group, module, in_double=True, **data or {}), trainer_of(group, **trainer or {}))


def seeded_apart(group: Group) -> Any:
    """Processes that start from other random numbers and codes; all take over those of the first one."""
    L.seed_everything(3 + group.rank, verbose=False)
    apart = representation("codebooks")
    state = apart.predictor.state_dict()
    apart.predictor.load_state_dict({**state, "_extra_state": state["_extra_state"].roll(group.rank)})  # the codes
    module = scheme("progressive", in_double(apart), group.batch_size)
    return fit(module, images(group, module, in_double=True), trainer_of(group))


def weighed_codes(group: Group) -> Any:
    """Codes that are computed again at the start of the fit, with sensitivities on images that the processes share."""
    L.seed_everything(3, verbose=False)
    option = Sensitivity("activation", num_images=13)
    module = scheme("recon_only", representation("codebooks"), group.batch_size, sensitivity=option)
    return fit(module, images(group, module), trainer_of(group))


def few_kernels(layers: str, loss: str, batch_size: int, group: Group) -> Any:
    """Layers whose kernels are shared out unevenly: of several sizes, or fewer than processes."""
    L.seed_everything(3, verbose=False)
    few = in_double(tiny_representation(layers=LayerFilter([layers])))
    sampling = Uniform(batch_size // group.processes)
    module = ReconOnly(few, sgd, sampling=sampling, loss=loss)  # type: ignore[arg-type]
    return fit(module, images(group, module), trainer_of(group))


def complete(name: str, group: Group) -> Any:
    """Fit, test and predict as the command line does, with every callback, into a run's folder."""
    L.seed_everything(3, verbose=False)
    options = {"rounds": 2, "min_delta": None} if name == "progressive" else {}
    module = scheme(name, representation("mlp"), group.batch_size, **options)
    data = images(group, module, eval_sets=[Corrupted(["gaussian_noise", "contrast"], [3])])
    trainer = trainer_of(
        group,
        max_epochs=2,
        num_sanity_val_steps=2,
        log_every_n_steps=1,
        enable_checkpointing=True,
        logger=TensorBoardLogger(group.run, "", ""),
        plugins=[DurableCheckpointIO()],
        callbacks=[
            AdversarialAccuracy(fgsm_255=[4], ifgsm_255=[4], steps=2),
            LowFrequencyEnergy(),
            LayerDifference(),
            RepresentationFigures(),
            RoundCheckpoint(),
            Summary(),
            LearningRate(),
            ValidationLog(),
            WeightsWriter(),
            Throughput(1),
            BestCheckpoint(),
            ModelCheckpoint(filename="last", save_on_train_epoch_end=True, enable_version_counter=False),
        ],
    )
    outcome = fit(module, data, trainer)
    trainer.test(module, datamodule=data, verbose=False)
    outcome["test"] = {key: float(value) for key, value in trainer.callback_metrics.items()}
    trainer.predict(module, datamodule=data)
    return outcome


class PoisonTheSecond(L.Callback):
    """A NaN in the third batch of the second process."""

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: object, number: int
    ) -> None:
        if number == 2 and trainer.global_rank == 1:
            assert isinstance(pl_module, Scheme)
            pl_module.representation.target.fill_(torch.nan)


def poisoned(group: Group) -> str:
    L.seed_everything(3, verbose=False)
    module = scheme("recon_only", representation("mlp"), group.batch_size)
    return refused(module, group, callbacks=[PoisonTheSecond()])


def too_few_images(group: Group) -> str:
    L.seed_everything(3, verbose=False)
    module = scheme("recon_only", representation("mlp"), group.batch_size)
    return refused(module, group, images_=group.processes - 1)


def refused(module: Scheme, group: Group, images_: int | None = None, **options: Any) -> str:
    data = images(group, module)
    if images_ is not None:
        data.counts = (STEPS * 64, images_, images_)
    try:
        trainer_of(group, **options).fit(module, datamodule=data)
    except NernlitError as error:
        return str(error)
    raise AssertionError("nothing was refused")


class SaveAfter(L.Callback):
    """Save a checkpoint after some steps, in the middle of an epoch."""

    def __init__(self, file: Path, steps: int) -> None:
        self.file, self.steps = file, steps

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.steps:
            trainer.save_checkpoint(self.file)


def saved(name: str, group: Group) -> Any:
    """A fit of six steps that saves a checkpoint after the fourth: the first of an epoch."""
    module, data, trainer = _resumable(name, group)
    trainer.callbacks.append(SaveAfter(group.folder / f"{name}.{group.processes}.ckpt", STEPS + 1))
    return fit(module, data, trainer)


def resumed(name: str, before: int, group: Group) -> Any:
    """The same fit, continued from the checkpoint of another number of processes."""
    module, data, trainer = _resumable(name, group)
    return fit(module, data, trainer, ckpt_path=group.folder / f"{name}.{before}.ckpt")


def _resumable(name: str, group: Group) -> Any:
    L.seed_everything(3, verbose=False)
    options = {"rounds": 2, "min_delta": None} if name == "progressive" else {}
    module = scheme(name, in_double(representation("mlp")), group.batch_size, **options)
    augmentation = {"pad_crop": 1, "flip": True} if module.trains_on_images else {}
    return module, images(group, module, in_double=True, **augmentation), trainer_of(group, max_epochs=2)


AUGMENTATION = {"pad_crop": 1, "flip": True, "resized_crop": 0.5, "mixup": 0.4}
CASES: dict[str, Callable[[Group], Any]] = {
    **{
        f"{name}-{predictor}{quantized}": partial(matrix, name, f"{predictor}{quantized}")
        for name in SCHEMES
        for predictor in ("mlp", "table", "codebooks")
        for quantized in ("", "_quantized")
    },
    "rmse": partial(in_double_fit, "recon_only", "mlp", loss="rmse"),
    "augmented": partial(in_double_fit, "decoupled_distill", "mlp", data=AUGMENTATION),
    "noise": partial(in_double_fit, "decoupled_distill", "mlp", data={"train_on": "noise", "steps_per_epoch": STEPS}),
    "tuned": partial(in_double_fit, "decoupled_distill", "mlp", represented={"tune_kept": "all"}),
    "calibrated": partial(in_double_fit, "recon_only", "mlp", represented={"tune_kept": "all"}, calibration_images=60),
    "calibrated_distill": partial(
        in_double_fit, "decoupled_distill", "mlp", represented={"tune_kept": "affine"}, calibration_images=60
    ),
    "warmup": partial(in_double_fit, "baseline_joint", "mlp", represented={"tune_kept": "affine"}, warmup_steps=1),
    "target": partial(in_double_fit, "recon_only", "table_quantized", rate=Rate(target_bytes=18_000)),
    "cached_teacher": partial(
        in_double_fit, "decoupled_distill", "mlp", data={"flip": True}, teacher_flip=True, cache_teacher=True
    ),
    "ema": partial(in_double_fit, "decoupled_distill", "mlp", ema=0.5),
    "clipped": partial(
        in_double_fit, "decoupled_distill", "mlp", trainer={"gradient_clip_val": 1e-2, "accumulate_grad_batches": 2}
    ),
    "moving": partial(in_double_fit, "decoupled_distill", "moving"),
    "fisher": partial(in_double_fit, "recon_only", "mlp", sensitivity=Sensitivity("fisher", num_images=13)),
    "kronecker": partial(in_double_fit, "recon_only", "mlp", sensitivity=Sensitivity("kronecker", num_images=13)),
    "activation": partial(in_double_fit, "recon_only", "mlp", sensitivity=Sensitivity("activation", num_images=13)),
    "progressive-seeded_apart": seeded_apart,
    "weighed_codes": weighed_codes,
    "mixed_mse": partial(few_kernels, "*", "mse", 16),
    "mixed_rmse": partial(few_kernels, "*", "rmse", 16),
    "six_kernels": partial(few_kernels, "depthwise", "mse", 16),
    "poisoned": poisoned,
    "too_few_images": too_few_images,
    **{f"complete-{name}": partial(complete, name) for name in SCHEMES},
    **{f"saved-{name}": partial(saved, name) for name in SCHEMES},
    **{f"resumed-{name}-from-{before}": partial(resumed, name, before) for name in SCHEMES for before in (1, 2, 4)},
}
