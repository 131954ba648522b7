"""Short fits of the digits' network, and what each process records."""

from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Any

import lightning as L
import torch
from torch import Tensor

from nernlit.data import DigitsDataModule, ImageDataModule
from nernlit.data.base import Split
from nernlit.data.sources import ImageSource, TensorImages
from nernlit.kernels import Uniform
from nernlit.originals import Original
from nernlit.predictors import MLP, Codebooks, Predictor, Quantize, Table
from nernlit.representation import Representation
from nernlit.training import BaselineJoint, DecoupledDistill, Progressive, ReconOnly, ReconstructionPhase, Scheme
from nernlit.training.objectives import Step
from nernlit.utilities.processes import ALONE, Processes
from tests.training.ddp.group import JOINT, Group

STEPS = 3
#: Not a multiple of any number of processes, nor of the batches: a padding sampler would count images twice.
IMAGES = 31
EVAL_BATCH = 5


@cache
def _digits() -> tuple[Tensor, Tensor]:
    source = DigitsDataModule().build("train")
    assert source is not None
    return source[range(len(source))]


class FewDigits(ImageDataModule):
    """A few digits, for speed.

    Args:
        in_double: Whether training and evaluation get pixels as float64.
        options: See `ImageDataModule`.
    """

    classes = DigitsDataModule.classes
    mean, std = DigitsDataModule.mean, DigitsDataModule.std
    #: Images to train on, to validate and to test.
    counts = (STEPS * JOINT, IMAGES, IMAGES)

    def __init__(self, in_double: bool = False, **options: Any) -> None:
        super().__init__(**options)
        self.in_double = in_double

    def build(self, split: Split) -> ImageSource:
        images, labels = _digits()
        number = ("train", "val", "test").index(split)
        part = slice(sum(self.counts[:number]), sum(self.counts[: number + 1]))
        return TensorImages(images[part], labels[part])

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        batch = super().on_after_batch_transfer(batch, dataloader_idx)
        return [batch[0].double(), *batch[1:]] if self.in_double and isinstance(batch, tuple | list) else batch

    def numbered_images(self, processes: Processes = ALONE) -> Iterator[tuple[Tensor, Tensor]]:
        for numbers_B, pixels_BCHW in super().numbered_images(processes):
            yield numbers_B, pixels_BCHW.double() if self.in_double else pixels_BCHW


class Record(L.Callback):
    """What each process starts from, samples, sees, and ends with."""

    def __init__(self) -> None:
        self.outcome: dict[str, Any] = {"gradients": [], "kernels": [], "images": []}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.outcome |= {"start": _trained(pl_module), "first_step": trainer.global_step}
        self._kernels, sampled = Step.kernels, self.outcome["kernels"]

        def noted(step: Step, rows_S: Tensor) -> Tensor:
            sampled.append(rows_S.clone())
            return self._kernels(step, rows_S)

        Step.kernels = noted  # type: ignore[method-assign]

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if isinstance(batch, tuple | list):
            self.outcome["images"].append(batch[0].clone())

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        found = [p.grad for p in pl_module.trained_parameters()]
        self.outcome["gradients"].append([torch.zeros(()) if g is None else g.detach().clone() for g in found])

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        Step.kernels = self._kernels  # type: ignore[method-assign]
        assert isinstance(pl_module, Scheme)
        predictor = getattr(pl_module.representation.predictor, "predictor", pl_module.representation.predictor)
        self.outcome |= {
            "end": _trained(pl_module),
            "steps": trainer.global_step,
            "error_weights": pl_module.error_weights.table,
            "codes": predictor.codes if isinstance(predictor, Codebooks) else None,
            "figures": {name: float(value) for name, value in trainer.callback_metrics.items()},
            "rounds": [vars(ended) for ended in getattr(pl_module, "ended", [])],
        }


def _trained(module: L.LightningModule) -> list[Tensor]:
    return [p.detach().clone() for p in module.trained_parameters()]


def trainer_of(group: Group, **options: Any) -> L.Trainer:
    """Quiet, and without files unless the options say otherwise."""
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "max_epochs": 1}
    return L.Trainer(
        **{**quiet, "enable_model_summary": False, "num_sanity_val_steps": 0, **options},  # type: ignore[arg-type]
        accelerator="cpu",
        devices=group.processes,
        strategy="ddp" if group.processes > 1 else "auto",
        default_root_dir=str(group.run),
    )


def fit(module: Scheme, data: ImageDataModule, trainer: L.Trainer, **options: Any) -> dict[str, Any]:
    record = Record()
    trainer.callbacks.append(record)  # type: ignore[attr-defined]
    trainer.fit(module, datamodule=data, **options)
    return record.outcome


def sgd(params: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1)


PREDICTORS: dict[str, Callable[[], Predictor]] = {
    "mlp": lambda: MLP(16),
    "table": lambda: Table(scale="layer"),
    "moving": lambda: Codebooks(2, 3, iterations=2, beam=2, move=0.05, move_rate=0.3),
    "codebooks": lambda: Codebooks(2, 3, share="stage", scale="filter", iterations=2, beam=2),
}


def representation(predictor: str, **options: Any) -> Representation:
    """Of the digits' network; the name of a predictor may end in `_quantized`."""
    name, _, quantized = predictor.partition("_")
    made = Representation(
        Original("digits_resnet8", pretrained=True),
        PREDICTORS[name](),
        order="none",
        quantize=Quantize(bits=3) if quantized else None,
        **options,
    )
    if name == "table":  # it starts without an error, hence without gradients
        with torch.no_grad():
            for parameter in made.predictor.parameters():
                parameter.mul_(1 + 0.3 * torch.randn(parameter.shape))
    return made


def scheme(name: str, represented: Representation, batch_size: int, **options: Any) -> Scheme:
    sampling = Uniform(batch_size)
    if name == "recon_only":
        return ReconOnly(represented, sgd, sampling=sampling, **options)
    if name == "baseline_joint":
        return BaselineJoint(
            represented, sgd, sampling=sampling, **{"feature_weight": 1e-2, "kd_weight": 1.0, **options}
        )
    if name == "progressive":
        return Progressive(represented, optimizer=sgd, sampling=sampling, **{"rounds": 1, "trials": 2, **options})
    phase_1 = ReconstructionPhase(1, sampling=sampling)
    return DecoupledDistill(
        represented, optimizer=sgd, **{"reconstruction": phase_1, "precision": "fp32", "temperature": 4.0, **options}
    )


def images(group: Group, module: Scheme, **options: Any) -> FewDigits:
    train: dict[str, Any] = {"train_on": "images"} if module.trains_on_images else {"train_on": "none"}
    steps = {} if module.trains_on_images else {"steps_per_epoch": STEPS}
    return FewDigits(batch_size=group.batch_size, eval_batch_size=EVAL_BATCH, **{**train, **steps, **options})
