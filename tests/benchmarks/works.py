"""Benchmark cases: each function sets up a workload and returns it as a function without arguments."""

from collections.abc import Callable

import lightning as L
import timm.optim
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from nernlit.callbacks import AdversarialAccuracy
from nernlit.data import Corrupted, ImageDataModule
from nernlit.data.augment import Draws, pad_crop_flip
from nernlit.data.batches import BatchSampler
from nernlit.data.sources import ImageSource, TensorImages
from nernlit.kernels import Uniform
from nernlit.losses import reconstruction_mse
from nernlit.originals import Folded, Original
from nernlit.predictors import MLP, PredictorEnsemble
from nernlit.representation import Representation
from nernlit.training import BaselineJoint, DecoupledDistill, ReconOnly, ReconstructionPhase, Step
from nernlit.training.scheme import Precision, Scheme

Work = Callable[[], object]
IMAGES = 256


def random_original(name: str) -> Original:
    """A network with random weights, which takes as long as a trained one."""
    torch.manual_seed(0)
    original = Original(name)
    original.weights_from = "random numbers, for timing"
    return original


def representation(name: str, hidden: int) -> Representation:
    return Representation(random_original(name), MLP(hidden, activation="gelu", base=0.9), order="none")


def recon_step(hidden: int, batch: int = 4096, trials: int = 1, precision: Precision = "fp32") -> tuple[Work, int]:
    """A step of Recon-only, or of a progressive round, on ResNet20, and its operations in linear layers.

    Sample, predict, compare, backward, Muon.
    """
    whole = representation("cifar_resnet20", hidden)
    predictors = PredictorEnsemble(whole.predictor, trials)
    predictors.reset(*range(trials))
    optimizer = timm.optim.Muon(predictors.parameters(), lr=0.02, momentum=0.9, nesterov=True)
    sampling, norms, step = Uniform(batch), whole.target.flatten(1).norm(dim=1), 0

    def work() -> None:
        nonlocal step
        step += 1
        rows = sampling.indices(norms, 0, step)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            predicted = predictors(whole.addresses[rows])
        predicted = predicted * whole.scale
        loss = reconstruction_mse(predicted, whole.target[rows].expand_as(predicted))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return work, 6 * batch * whole.predictor.num_params * trials


def image_steps(hidden: int, precision: Precision) -> dict[str, Work]:
    """Steps on ResNet20 that look at images, and the parts that they cannot do without, each alone."""
    whole = representation("cifar_resnet20", hidden)
    distill = DecoupledDistill(
        whole, optimizer=torch.optim.Adam, reconstruction=ReconstructionPhase(1), precision=precision
    )
    joint = BaselineJoint(whole, optimizer=torch.optim.Adam, precision=precision)
    optimizer = torch.optim.Adam(whole.predictor.parameters(), lr=1e-3)
    pixels = torch.rand(IMAGES, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    weights = {key: value.detach().requires_grad_() for key, value in whole.weights().items()}

    def step(module: Scheme) -> None:
        labels = torch.zeros(IMAGES).long()
        seen = Step(whole, (pixels, labels), whole.target, module.norms_N, module.sizes_N, autocast=module.autocast)
        loss = torch.stack(list(module.stages[-1].objective(seen).values())).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def teacher() -> None:
        with torch.inference_mode(), distill.autocast():
            whole.original(pixels)

    def student() -> None:
        with distill.autocast():
            logits = whole(pixels, weights)
        logits.float().square().sum().backward()

    def table() -> None:
        with distill.autocast():
            kernels = whole.kernels()
        kernels.square().sum().backward()

    return {
        "distillation": lambda: step(distill),
        "joint": lambda: step(joint),
        "teacher": teacher,
        "student": student,
        "table": table,
    }


def decode(name: str, hidden: int) -> Work:
    whole = representation(name, hidden)

    def work() -> dict[str, Tensor]:
        with torch.no_grad():
            return whole.weights()

    return work


def evaluation(images: int = 2_048, batch: int = 512) -> tuple[Work, Work]:
    """The reconstructed ResNet20 and the original on some images, as validation runs them; and the two CNNs alone."""
    whole = representation("cifar_resnet20", 180)
    batches = torch.randint(256, (images, 3, 32, 32), dtype=torch.uint8).split(batch)

    def work() -> None:
        with torch.inference_mode():
            weights = whole.weights()
            for pixels in batches:
                floats = pixels.float().div(255)
                whole(floats, weights).argmax(1)
                whole.original(floats).argmax(1)

    ready = [pixels.float().div(255) for pixels in batches]

    def alone() -> None:
        with torch.inference_mode():
            for _ in range(2):
                for pixels in ready:
                    whole.original(pixels)

    return work, alone


def robustness(images: int = 256) -> tuple[Work, Work]:
    """Clean, corrupted (45 settings) and attacked (4 settings) accuracy of two ResNet20s by one `Trainer.test`; and the
    CNNs' passes that this takes, alone."""
    whole = representation("cifar_resnet20", 180)
    source = TensorImages(torch.randint(256, (images, 3, 32, 32), dtype=torch.uint8), torch.zeros(images).long())

    class Random(ImageDataModule):
        classes = tuple("0123456789")

        def build(self, split: str) -> ImageSource:
            return source

    data, attacks = Random(eval_batch_size=256, eval_sets=[Corrupted()]), AdversarialAccuracy()
    module = ReconOnly(whole, torch.optim.Adam)
    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(accelerator="cpu", callbacks=[attacks], enable_checkpointing=False, **options)  # type: ignore[arg-type]

    def work() -> None:
        trainer.test(module, datamodule=data, verbose=False)

    ready = [
        pixels.div(255).contiguous(memory_format=torch.channels_last) for pixels in source.images.float().split(256)
    ]
    folded, weights = Folded(whole.original, ready[0][:2]), {k: v.detach() for k, v in whole.weights().items()}

    def alone() -> None:
        for pixels in ready:
            for _ in range(2):
                with torch.inference_mode():
                    for _ in range(1 + 45):
                        whole(pixels, weights)
                for attack in attacks.attacks:
                    for _ in range(attack.steps):
                        asked = pixels.clone().requires_grad_()
                        torch.autograd.grad(folded(asked, weights).sum(), asked)
                    with torch.inference_mode():
                        folded(pixels, weights)

    return work, alone


def loader() -> Work:
    """An epoch of 10,000 CIFAR-sized images in batches of 256: shuffled, cropped, mirrored, as floats."""
    source = TensorImages(torch.randint(256, (10_000, 3, 32, 32), dtype=torch.uint8), torch.zeros(10_000))
    numbers = BatchSampler(len(source), 256, training=True)
    draws = Draws(0)

    def work() -> None:
        for batch in numbers:
            images, _ = source[batch]
            pad_crop_flip(images, 4, True, draws).float().div(255)

    return work


def torchvision_loader() -> Work:
    """The same work the published way: torchvision's transforms on one image after another, 1,000 images."""
    transform = v2.Compose(
        [v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip(), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    )
    images = [Image.fromarray(pixels) for pixels in torch.randint(256, (1_000, 32, 32, 3), dtype=torch.uint8).numpy()]

    class Published(Dataset[Tensor]):
        def __len__(self) -> int:
            return len(images)

        def __getitem__(self, index: int) -> Tensor:
            transformed: Tensor = transform(images[index])
            return transformed

    batches = DataLoader(Published(), batch_size=256, shuffle=True)

    def work() -> None:
        for _ in batches:
            pass

    return work
