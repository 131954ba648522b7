"""The base class of datasets. A dataset adds class names, pixel statistics and `build(split)`."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader

from nernlit.data.augment import Augmentation, Draws, to_pixels
from nernlit.data.batches import image_loader, require_enough, step_loader
from nernlit.data.channels import require_channels, statistics_of
from nernlit.data.eval_sets import EvalCondition, EvalSet, conditions_of
from nernlit.data.sources import ImageSource, InChannels
from nernlit.errors import DataError, NernlitError, UsageError, require_at_least, require_one_of
from nernlit.utilities.processes import ALONE, Processes

Split = Literal["train", "val", "test"]
TrainOn = Literal["images", "noise", "none"]

#: A split whose decoded pixels take at most this many bytes is decoded once and kept in memory.
_IN_MEMORY_BYTES = 4 * 2**30


def refuse_overfitting(trainer: Any) -> None:
    """Refuse Lightning's `overfit_batches`.

    Raises:
        UsageError: If the trainer has it.
    """
    if overfit := getattr(trainer, "overfit_batches", 0):
        raise UsageError(
            f"--trainer.overfit_batches {overfit} is not supported; "
            "--trainer.limit_train_batches N uses the first N batches of each epoch."
        )


class ImageDataModule(L.LightningDataModule, ABC):
    """Batches of pixels (B, C, H, W) in [0, 1] and labels (B,). The original normalizes the pixels itself.

    Args:
        batch_size: Training images (or noise images) per step and process.
        eval_batch_size: Images per batch and process in validation and test.
        val_share: Share of the training images that is held out for validation, if the dataset has no validation split.
        split_seed: Seed of that choice; separate from the run's seed, so that all runs validate on the same images.
        train_on: The batches to train on: `images`, `noise` (uniform pixels, labels -1) or `none` (only an index).
        steps_per_epoch: Steps per epoch with `noise` and `none`, 250 by default. With `images` an epoch is a pass over
            them, and a fit refuses this option.
        noise_range: For `train_on: noise`, which is U(-r, r) in pixels normalized with this dataset's statistics; NeRN
            draws from U(-2, 2).
        pad_crop: Pixels of zero padding before a random crop of training images; 0 for none. None for the
            default of this dataset (`usual_augmentation`).
        flip: Whether to mirror each training image with probability 1/2. None for what is usual for this dataset.
        resized_crop: Smallest area of a random crop of a training image, as a share of the image; the crop is resized
            to the image's size. None for no such crop; 0.08 is usual for ImageNet.
        mixup: Largest share of another image that is blended into a training image; 0 for none, 0.5 at most. Labels
            stay those of the larger share. This and the three options above are for `train_on: images`.
        num_workers: Processes that decode images, if the images do not fit in memory.
        eval_sets: Further test sets for `test`; see `nernlit.data.eval_sets`.
        select_on_test_as_the_paper_did: Validate on the test images, so that checkpoints and winners of rounds are
            selected by the images that they are tested on. All test figures are biased then. It exists to measure this
            bias, for nothing else.
    """

    #: Class names, in the order of the labels; empty until `setup` for datasets that find them on disk.
    classes: tuple[str, ...] = ()
    #: Channels of the images: 1, 3 or 4, or None for the dataset's own. `setup` sets it to those of `network`.
    channels: int | None = None
    #: The consumer of the images: an object with `in_chans` and `num_classes`. A trainer's module takes precedence.
    network: object = None
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    #: What `pad_crop` and `flip` are if None. None at all where mirrored or shifted images may have another class.
    usual_augmentation: ClassVar[Augmentation] = Augmentation()
    #: Whether training batches also have the images' numbers; set by a module that asks for them.
    numbered: bool = False
    #: Whether there are images; without them evaluations measure the weights only.
    has_images: ClassVar[bool] = True

    def __init__(
        self,
        batch_size: int = 256,
        eval_batch_size: int = 500,
        val_share: float = 0.1,
        split_seed: int = 0,
        train_on: TrainOn = "images",
        steps_per_epoch: int | None = None,
        noise_range: float = 2.0,
        pad_crop: int | None = 0,
        flip: bool | None = False,
        resized_crop: float | None = None,
        mixup: float = 0.0,
        num_workers: int = 0,
        eval_sets: Sequence[EvalSet] | None = None,
        select_on_test_as_the_paper_did: bool = False,
    ) -> None:
        super().__init__()
        require_at_least(1, batch_size=batch_size, eval_batch_size=eval_batch_size)
        if steps_per_epoch is not None:
            require_at_least(1, steps_per_epoch=steps_per_epoch)
        require_at_least(0, split_seed=split_seed, num_workers=num_workers)
        if not 0 < val_share < 1:
            raise UsageError(f"val_share={val_share}; expected a share of the training images between 0 and 1.")
        require_one_of(TrainOn, train_on=train_on)
        if not 0 < noise_range < math.inf:
            raise UsageError(f"noise_range={noise_range}; expected a finite number above 0.")
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.val_share, self.split_seed = val_share, split_seed
        self.train_on, self.noise_range = train_on, noise_range
        self.steps_per_epoch = 250 if steps_per_epoch is None and train_on != "images" else steps_per_epoch
        usual = self.usual_augmentation
        self.augmentation = Augmentation(
            usual.pad_crop if pad_crop is None else pad_crop, usual.flip if flip is None else flip, resized_crop, mixup
        )
        self.num_workers = num_workers
        self.eval_sets = list(eval_sets or [])
        self.select_on_test_as_the_paper_did = select_on_test_as_the_paper_did
        self.seed = torch.initial_seed() % 2**63
        self.sources: dict[Split, ImageSource] = {}
        self.conditions: list[EvalCondition] = []

    @abstractmethod
    def build(self, split: Split) -> ImageSource | None:
        """The images of a split as the dataset publishes it; None for `val` where it publishes none.

        Raises:
            DataError: If files are missing or wrong. The message names them and says what to put where.
        """

    def check(self) -> None:
        """Check the files before any image is decoded, and set `classes` if the dataset finds them on disk.

        Raises:
            DataError: If folders are missing, or have other classes than they should.
        """

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def setup(self, stage: str) -> None:
        trainer = self.trainer
        if trainer is not None and trainer.world_size > 1:
            self.seed = trainer.strategy.broadcast(self.seed)
        if stage == "predict":
            return  # needs no images
        refuse_overfitting(trainer)
        if self.select_on_test_as_the_paper_did:
            rank_zero_warn(
                "select_on_test_as_the_paper_did: true: the test images are also the validation images, on which "
                "checkpoints and rounds are selected. The accuracies of this run are biased upwards; do not compare "
                "them with those of other runs."
            )
        self.check()
        self._adopt_network(trainer.lightning_module if trainer is not None else self.network)
        splits: set[Split] = {"test"} if stage == "test" else {"val"}
        if stage == "fit" and self.train_on == "images":
            splits.add("train")
        if not splits <= self.sources.keys():
            for split, source in self._find(splits).items():
                self._keep(split, self._in_channels(source))
        if stage == "test":
            found = conditions_of(self.eval_sets, self.sources["test"], self.num_classes)
            self.conditions = [condition._replace(source=self._in_channels(condition.source)) for condition in found]

    def _adopt_network(self, network: object) -> None:
        """Take the channels of the network, and check its number of classes."""
        classes = getattr(network, "num_classes", self.num_classes)
        if classes == 0:
            raise DataError(
                f"{type(self).__name__} has images, but the original is no image classifier; "
                "use NoImages (`data: null`)."
            )
        if classes != self.num_classes:
            raise DataError(
                f"{type(self).__name__} has {self.num_classes} classes, but the original has {classes}; "
                "use the data it was trained on, or set its num_classes."
            )
        channels = getattr(network, "in_chans", self.channels)
        if channels is None:
            return
        require_channels(channels)
        if channels != self.channels:
            self.sources.clear()  # read for another network
        self.channels = channels
        own = type(self)  # not those of another network's channels
        self.mean, self.std = (statistics_of(values, channels) for values in (own.mean, own.std))

    def _find(self, splits: set[Split]) -> dict[Split, ImageSource]:
        """The images of these splits, not decoded yet."""
        if "test" in splits:
            return {"test": self._published("test")}
        val = self._published("test") if self.select_on_test_as_the_paper_did else self.build("val")
        if val is not None:
            return {"val": val, **({"train": self._published("train")} if "train" in splits else {})}
        train = self._published("train")
        held_out = max(1, round(self.val_share * len(train)))
        if "train" in splits and held_out >= len(train):
            raise DataError(
                f"{len(train)} training images, of which val_share={self.val_share} holds out {held_out} for "
                "validation: none is left to train on; add images, lower --data.val_share, or pass a folder val/."
            )
        chosen = torch.randperm(len(train), generator=torch.Generator().manual_seed(self.split_seed % 2**63))
        found = {"val": chosen[:held_out], "train": chosen[held_out:]}
        return {split: train.subset(found[split].sort().values) for split in ("val", "train") if split in splits}

    def _published(self, split: Split) -> ImageSource:
        source = self.build(split)
        assert source is not None, f"{type(self).__name__}.build({split!r}) returned nothing"
        return source

    def _in_channels(self, source: ImageSource) -> ImageSource:
        if self.channels is None or self.channels == source[[0]][0].shape[1]:
            return source
        return InChannels(source, self.channels)

    def _keep(self, split: Split, source: ImageSource) -> None:
        if split not in self.sources:
            bytes_each = source[[0]][0].numel()
            fits = bytes_each * len(source) <= _IN_MEMORY_BYTES
            self.sources[split] = source.in_memory() if fits else source

    def images(self, split: Literal["train", "test"]) -> ImageSource:
        """The images of a split, in the channels of `network` and not decoded yet. They need no `setup`.

        Raises:
            DataError: If files are missing or wrong.
            UsageError: If they do not fit the network.
        """
        self.check()
        self._adopt_network(self.network)
        return self._in_channels(self._find({"test"} if split == "test" else {"train", "val"})[split])

    def _source(self, split: str) -> ImageSource:
        if split not in self.sources:
            raise UsageError(
                f'the {split} images are not set up; call setup("{"test" if split == "test" else "fit"}").'
            )
        return self.sources[split]

    def train_dataloader(self) -> DataLoader[Any]:
        if self.train_on == "images" or self.steps_per_epoch is None:  # None with images only
            return self.loader(self._source("train"), self.batch_size, training=True, numbered=self.numbered)
        return step_loader(self.steps_per_epoch)

    def training_images(self, count: int, seed: int, processes: Processes = ALONE) -> Iterator[Tensor]:
        """Batches of `count` training images (all, if there are fewer): pixels (B, C, H, W) in [0, 1], not augmented.

        They are chosen at random by the seed alone; process r of W gets images r, r + W, r + 2 W, ... of them. Call
        `setup("fit")` first.

        Raises:
            DataError: If there are fewer images than processes.
        """
        if "train" not in self.sources:  # a fit that is not trained on them; they stay in their files
            self.sources["train"] = self._in_channels(self._find({"train", "val"})["train"])
        source = self.sources["train"]
        chosen = torch.randperm(len(source), generator=torch.Generator().manual_seed(seed % 2**63))[:count]
        require_enough(len(chosen), processes.world_size)
        for batch in chosen[processes.rank :: processes.world_size].split(self.eval_batch_size):
            yield to_pixels(source[batch.tolist()][0])

    def numbered_images(self, processes: Processes = ALONE) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's share of the training images, in batches: numbers (B,) and pixels (B, C, H, W), not augmented.

        The numbers are those of training batches with `numbered`, from 0 to `num_training_images` - 1. Call
        `setup("fit")` first.
        """
        numbers_N = torch.arange(self.num_training_images)
        for numbers_B in numbers_N[processes.rank :: processes.world_size].split(self.batch_size):
            yield numbers_B, to_pixels(self.sources["train"][numbers_B.tolist()][0])

    @property
    def num_training_images(self) -> int:
        """Number of the images that are trained on; known after `setup("fit")`."""
        return len(self.sources["train"])

    def val_dataloader(self) -> DataLoader[Any]:
        return self.loader(self._source("val"))

    def test_dataloader(self) -> list[DataLoader[Any]]:
        """The dataset's own test images first, then those of every condition of `eval_sets`."""
        return [self.loader(source) for source in (self._source("test"), *(c.source for c in self.conditions))]

    def predict_dataloader(self) -> DataLoader[Any]:
        """One batch without images: `predict` returns the network's weights, which depend on no image."""
        return step_loader(1)

    def loader(
        self, source: ImageSource, batch_size: int | None = None, training: bool = False, numbered: bool = False
    ) -> DataLoader[Any]:
        """A loader of this process's batches of images, for evaluation unless it is for training."""
        batch_size = batch_size or self.eval_batch_size
        return image_loader(source, batch_size, training, self.seed, self.num_workers, self.trainer, numbered)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        if isinstance(batch, NernlitError):
            raise batch
        trainer = self.trainer
        training = trainer is not None and trainer.training
        if training and self.train_on != "images":
            return self._noise() if self.train_on == "noise" else batch
        if not isinstance(batch, tuple | list):
            return batch
        images_BCHW, *others = batch  # labels, and numbers if they are asked for
        if training:
            return self.augmentation(images_BCHW, self._draws()), *others
        return to_pixels(images_BCHW), *others

    def _draws(self) -> Draws:
        """Seeded by the step, so that a resumed run draws the same numbers."""
        trainer = self.trainer
        assert trainer is not None
        step = trainer.fit_loop.total_batch_idx
        return Draws(self.seed + 7_919 * (step + 1), trainer.global_rank, trainer.world_size)

    def _noise(self) -> tuple[Tensor, Tensor]:
        """A batch of noise; an image is a function of the seed, the step and its place in the joint batch."""
        trainer = self.trainer
        assert trainer is not None
        device, shape = trainer.strategy.root_device, self.sources["val"][[0]][0].shape[1:]
        first = (trainer.fit_loop.total_batch_idx * trainer.world_size + trainer.global_rank) * self.batch_size
        # A seed for each image: drawing the joint batch of all processes would take their number times as long.
        seeds = [self.seed + 7_919 * (first + number + 1) for number in range(self.batch_size)]
        generator = torch.Generator()
        unit = torch.stack([torch.rand(shape, generator=generator.manual_seed(seed % 2**63)) for seed in seeds])
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        pixels = (2 * unit - 1) * self.noise_range * std + mean
        return pixels.to(device), torch.full((self.batch_size,), -1, device=device)

    def state_dict(self) -> dict[str, Any]:
        return {"seed": self.seed, "split": self._split_options()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue with the seed of a fit.

        Raises:
            UsageError: If the fit had other training or validation images.
        """
        if self.trainer is not None and self.trainer.state.fn != "fit":
            return  # an evaluation trains on no image
        self.seed = state_dict["seed"]
        now = self._split_options()
        for name, fitted in state_dict.get("split", {}).items():
            if now[name] != fitted:
                raise UsageError(
                    f"--data.{name} {now[name]}: the fit was started with {fitted}, and its accuracies are of those "
                    "images; leave it out, or start a new fit."
                )

    def _split_options(self) -> dict[str, Any]:
        names = ("val_share", "split_seed", "select_on_test_as_the_paper_did", "train_on")
        return {name: getattr(self, name) for name in names}
