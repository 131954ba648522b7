"""Every dataset in its published form on disk: fit, validate and test, with the test sets that belong to it."""

from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import pytest
import timm
import torch
from timm.data import ImageNetInfo

from nernlit.data import (
    CIFAR10C,
    CIFAR100C,
    CIFAR10DataModule,
    CIFAR100DataModule,
    Corrupted,
    FolderDataModule,
    ImageDataModule,
    ImageNetDataModule,
    ImageNetR,
    STL10DataModule,
)
from nernlit.originals import Original
from nernlit.predictors import MLP
from nernlit.representation import Representation
from nernlit.training import DecoupledDistill, ReconstructionPhase
from tests.fakes import (
    quiet_trainer,
    without_hashes,
    write_cifar10,
    write_cifar100,
    write_cifar_c,
    write_image_folder,
    write_stl10,
)

SMALL = {"batch_size": 4, "eval_batch_size": 8, "val_share": 0.2}
LITTLE = Corrupted(["contrast"], [1])


def _cifar10(root: Path) -> ImageDataModule:
    published = CIFAR10C(str(write_cifar_c(root / "c", ("fog", "frost"), 10)), ["fog", "frost"], [1, 5])
    return CIFAR10DataModule(str(write_cifar10(root)), eval_sets=[published, LITTLE], **SMALL)


def _cifar100(root: Path) -> ImageDataModule:
    published = CIFAR100C(str(write_cifar_c(root / "c", ("fog",), 100, 100)), ["fog"], [2])
    return CIFAR100DataModule(str(write_cifar100(root)), eval_sets=[published], **SMALL)


def _stl10(root: Path) -> ImageDataModule:
    return STL10DataModule(str(write_stl10(root)), eval_sets=[LITTLE], **SMALL)


def _imagenet(root: Path) -> ImageDataModule:
    write_image_folder(root, 1000, 1, ("train", "val"), ImageNetInfo().label_names())
    ids = (files("timm.data") / "_info" / "imagenet_r_synsets.txt").read_text().split()
    write_image_folder(root, 200, 1, ("r",), ids)
    renditions = ImageNetR(str(root / "r"), model="cifar_resnet20")
    return ImageNetDataModule(str(root), model="cifar_resnet20", eval_sets=[renditions], **{**SMALL, "batch_size": 64})


def _folder(root: Path) -> ImageDataModule:
    return FolderDataModule(str(write_image_folder(root, 3, 10)), image_size=32, eval_sets=[LITTLE], **SMALL)


@pytest.mark.parametrize(
    ("make", "of_sets"),
    [
        (_cifar10, {"cifar10c", "cifar10c_fog_5", "cifar10c_frost_1", "corrupted"}),
        (_cifar100, {"cifar100c", "cifar100c_fog_2"}),
        (_stl10, {"corrupted_contrast_1"}),
        (_imagenet, {"imagenet_r"}),
        (_folder, {"corrupted"}),
    ],
)
def test_fit_validate_and_test(
    make: Callable[[Path], ImageDataModule], of_sets: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_hashes(monkeypatch)
    data = make(tmp_path)
    data.setup("validate")
    torch.manual_seed(0)
    net = timm.create_model("test_resnet", num_classes=data.num_classes)
    original = Original.from_module(net, data.num_classes, mean=data.mean, std=data.std)
    representation = Representation(original, MLP(8, kernel_size=7), order="none")
    module = DecoupledDistill(representation, optimizer=torch.optim.Adam, reconstruction=ReconstructionPhase(1))
    trainer = quiet_trainer(max_steps=2, limit_val_batches=2)
    trainer.fit(module, datamodule=data)
    assert trainer.global_step == 2
    trainer.validate(module, datamodule=data, verbose=False)
    assert 0 <= trainer.callback_metrics["val/acc_original"] <= 1
    trainer.test(module, datamodule=data, verbose=False)
    assert {f"test/acc_{name}{suffix}" for name in of_sets for suffix in ("", "_original")} <= set(
        trainer.callback_metrics
    )
