"""Kilobyte-sized networks, datasets and runs for the tests."""

import pickle
from collections.abc import Sequence
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from nernlit.originals import Original
from nernlit.predictors import MLP
from nernlit.representation import Representation
from nernlit.representation.onnx import can_write_onnx
from nernlit.utilities.constants import WithConstants

CONFIGS = Path(__file__).parent.parent / "configs"
STATISTICS = {"mean": [0.5], "std": [0.5]}
#: The mark of tests that write ONNX models.
NEEDS_ONNX = pytest.mark.skipif(not can_write_onnx(), reason="this torch cannot write the ONNX models")


class TinyCNN(nn.Module):
    """Every kind of convolution: 3x3, depthwise, 1x1 grouped, a 1x3 one, and one that is larger than the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 6, 5, padding=2, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.pointwise = nn.Conv2d(6, 8, 1, groups=2)
        self.wide = nn.Conv2d(8, 4, (1, 3), padding=(0, 1))
        self.head = nn.Linear(4, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        return self.head(self.wide(torch.relu(self.pointwise(self.depthwise(x)))).mean((2, 3)))


class SharingCNN(nn.Module):
    """Weights under several names: a module twice, one more by way of a container, a parameter of two modules."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 3, 3, padding=1)
        self.again = self.a
        self.chain = nn.Sequential(nn.ReLU(), self.a)
        self.tied = nn.Conv2d(3, 3, 3, padding=1)
        self.tied.weight = self.a.weight
        self.own = nn.Conv2d(3, 4, 1)
        self.head = nn.Linear(4, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.own(self.tied(self.chain(self.again(self.a(x))))).mean((2, 3)))


class UntouchableCNN(nn.Module):
    """A CNN that must never run."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        raise AssertionError("the CNN ran")


def tiny_original(seed: int = 0) -> Original:
    torch.manual_seed(seed)
    return Original.from_module(TinyCNN(), 10, **STATISTICS)


def tiny_representation(seed: int = 0, **options: object) -> Representation:
    original = tiny_original(seed)
    torch.manual_seed(seed + 1)
    return Representation(original, MLP(8, depth=3, kernel_size=5, num_frequencies=4), **options)  # type: ignore[arg-type]


def in_double(representation: Representation) -> Representation:
    """With its constants too, which conversions leave alone: a reference needs more digits than it is compared in."""
    representation.double().original.double()
    for module in representation.modules():
        for name, value in list(vars(module).items()):
            if isinstance(module, WithConstants) and isinstance(value, Tensor) and value.is_floating_point():
                module.set_constant(name, value.double())
    return representation


def digits_representation(hidden: int = 8) -> Representation:
    """Of a trained network."""
    torch.manual_seed(0)
    return Representation(Original("digits_resnet8", pretrained=True), MLP(hidden, num_frequencies=4))


def write_weights(name: str, path: Path, **options: object) -> Path:
    """A file of random weights of a timm model."""
    torch.manual_seed(0)
    state = Original(name, **options).net.state_dict()  # type: ignore[arg-type]
    for key, value in state.items():
        if key.endswith("running_var"):
            value.fill_(1e3)  # with its kernels replaced by random ones, a deep network must not overflow
    save_file(state, path)
    return path


def write_image_folder(
    root: Path,
    classes: int,
    each: int,
    splits: tuple[str, ...] = ("train", "test"),
    names: Sequence[str] | None = None,
) -> Path:
    """An ImageFolder tree of 32x32 noise."""
    generator = np.random.default_rng(0)
    for split in splits:
        for label in range(classes):
            folder = root / split / (names[label] if names else f"class{label:03d}")
            folder.mkdir(parents=True)
            for number in range(each):
                pixels = generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return root


def write_cifar10(root: Path, each: int = 10) -> Path:
    """The published layout of CIFAR-10 with `each` images a file."""
    names = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")
    return _write_cifar(root, "cifar-10-batches-py", names, ("labels", "batches.meta", "label_names"), 10, each)


def write_cifar100(root: Path, each: int = 100) -> Path:
    """The published layout of CIFAR-100 with `each` images a file."""
    keys = ("fine_labels", "meta", "fine_label_names")
    return _write_cifar(root, "cifar-100-python", ("train", "test"), keys, 100, each)


def _write_cifar(
    root: Path, base: str, names: Sequence[str], keys: tuple[str, str, str], classes: int, each: int
) -> Path:
    (root / base).mkdir(parents=True)
    generator = np.random.default_rng(0)
    labels, meta, label_names = keys
    contents: dict[str, dict[str, object]] = {meta: {label_names: [f"class{i}" for i in range(classes)]}}
    for name in names:
        pixels = generator.integers(0, 256, (each, 3072), dtype=np.uint8)
        contents[name] = {"data": pixels, labels: [i % classes for i in range(each)]}
    for name, content in contents.items():
        with (root / base / name).open("wb") as file:
            pickle.dump(content, file)
    return root


def write_cifar_c(root: Path, corruptions: tuple[str, ...], each: int, classes: int = 10) -> Path:
    """The published layout of CIFAR-10-C and CIFAR-100-C with `each` images per severity."""
    root.mkdir(exist_ok=True)
    generator = np.random.default_rng(0)
    for name in corruptions:
        np.save(root / f"{name}.npy", generator.integers(0, 256, (5 * each, 32, 32, 3), dtype=np.uint8))
    np.save(root / "labels.npy", np.tile(np.arange(each) % classes, 5))
    return root


def write_stl10(root: Path, each: int = 20) -> Path:
    """The published layout of STL-10 with `each` images a split."""
    folder = root / "stl10_binary"
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    (folder / "class_names.txt").write_text("\n".join(f"class{i}" for i in range(10)))
    for split in ("train", "test"):
        generator.integers(0, 256, (each, 3, 96, 96), dtype=np.uint8).tofile(folder / f"{split}_X.bin")
        (np.arange(each) % 10 + 1).astype(np.uint8).tofile(folder / f"{split}_y.bin")
    return root


def without_hashes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torchvision take a fake CIFAR for the published one."""
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5=None: Path(path).is_file())


class PowerCut(L.Callback):
    """Ends a run without warning before the given batch, as a killed process would."""

    def __init__(self, before_batch: int) -> None:
        self.before_batch = before_batch

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: object, _: int) -> None:
        if trainer.fit_loop.total_batch_idx == self.before_batch:
            raise ConnectionAbortedError("power cut")


def quiet_trainer(**options: object) -> L.Trainer:
    """A trainer that writes nothing and shows nothing."""
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    return L.Trainer(**{**quiet, "enable_model_summary": False, **options})  # type: ignore[arg-type]


#: A fit of two epochs of five steps with a tiny predictor, on the command line.
QUICK = [
    "-c",
    str(CONFIGS / "digits_h96.yaml"),
    "--trainer.max_epochs=2",
    "--data.steps_per_epoch=5",
    "--model.representation.predictor.hidden=8",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.log_every_n_steps=1",
    "--trainer.accelerator=cpu",
    "--trainer.devices=1",
    "--threads=1",  # the last bits of a result depend on it, and by default it on the other programs
]
