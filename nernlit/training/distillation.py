"""The distillation objective: the reconstructed network learns from a teacher, the original's feature maps or labels.

Shapes: B images, C classes.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, final

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from nernlit.errors import UsageError, require_at_least, require_positive
from nernlit.losses import feature_map_loss, kd_loss
from nernlit.originals import NERN_TAPS, FeatureTaps, Folded, Original
from nernlit.training.batches import labels_of
from nernlit.training.objectives import NO_LABELS, Objective, Step, full_reconstruction_error
from nernlit.training.teachers import frozen_teacher
from nernlit.utilities.processes import Processes
from nernlit.utilities.progress import progress

Autocast = Callable[[], AbstractContextManager[Any]]


@final
class Distillation(Objective):
    """Losses on the outputs of the reconstructed network: against a teacher's logits, the original's maps, and labels.

    A term with weight 0 is not computed.

    Args:
        original: The representation's original. The student is its architecture with predicted weights.
        teacher: The classifier whose logits are learned, with the same classes; the original by default.
        kd_weight: Weight of the KL divergence from the teacher.
        temperature: Softmax temperature of student and teacher.
        kd_inside_log: Added to probabilities inside the divergence's logarithms (NeRN's code adds 1e-4).
        feature_weight: Weight of the feature-map loss between student and original.
        cross_entropy_weight: Weight of the cross-entropy with the labels.
        recon_weight: Weight of the mean squared error of all predicted weights, in units of the representation's scale.
        taps: Modules whose feature maps are compared; see `FeatureTaps`.
        teacher_flip: Whether the teacher's logits are the mean of those for an image and for its mirror image.
        cache_teacher: Whether the teacher's logits of all training images are computed once, by `cache_teacher_logits`,
            and looked up in each step.

    Raises:
        UsageError: If the teacher has random weights or other classes, or would have no effect, or an option is out of
            its range.
    """

    needs_images = True

    def __init__(
        self,
        original: Original,
        teacher: Original | None = None,
        kd_weight: float = 1.0,
        temperature: float = 1.0,
        kd_inside_log: float = 0.0,
        feature_weight: float = 0.0,
        cross_entropy_weight: float = 0.0,
        recon_weight: float = 0.0,
        taps: Sequence[str] = NERN_TAPS,
        teacher_flip: bool = False,
        cache_teacher: bool = False,
    ) -> None:
        require_at_least(0, kd_weight=kd_weight, cross_entropy_weight=cross_entropy_weight, recon_weight=recon_weight)
        require_at_least(0, feature_weight=feature_weight, kd_inside_log=kd_inside_log)
        require_positive(temperature=temperature)
        for name, value in (("teacher_flip", teacher_flip), ("cache_teacher", cache_teacher)):
            if value and not kd_weight:
                raise UsageError(f"{name}=True, but kd_weight is 0; set it above 0, or leave out {name}.")
        if teacher is not None and not kd_weight:
            raise UsageError("a teacher is given, but kd_weight is 0; set it above 0, or leave out the teacher.")
        super().__init__()
        self.set_constant("original", original)
        if teacher is not None:
            self.set_constant("teacher", frozen_teacher(teacher, original))
        self.kd_weight, self.temperature, self.kd_inside_log = kd_weight, temperature, kd_inside_log
        self.feature_weight, self.cross_entropy_weight = feature_weight, cross_entropy_weight
        self.recon_weight = recon_weight
        self.needs_labels, self.reconstructs = cross_entropy_weight > 0, recon_weight > 0
        self.taps = taps
        if feature_weight:
            FeatureTaps(original.net, taps)  # refuses taps that the network does not have, before phase 1
        self.teacher_flip, self.cache_teacher = teacher_flip, cache_teacher
        self._networks: tuple[Folded, Folded] | None = None
        self._cached_logits_NC: Tensor | None = None

    original: Original

    def reset(self) -> None:
        self._networks = self._cached_logits_NC = None

    @property
    def needs_teacher_logits(self) -> bool:
        """Whether `cache_teacher_logits` must be called before the next step."""
        return self.cache_teacher and self._cached_logits_NC is None

    @torch.no_grad()
    def cache_teacher_logits(
        self, images: Iterable[tuple[Tensor, Tensor]], count: int, autocast: Autocast, processes: Processes
    ) -> None:
        """Compute the teacher's logits of all training images.

        Args:
            images: Batches of this process's share: numbers (B,) and pixels (B, C, H, W) in [0, 1].
            count: Number of images of all processes.
            autocast: Returns the context of the precision of training steps.
            processes: The processes that share the images; all of them get the same logits.
        """
        device = self.original.mean.device
        logits_NC = torch.zeros(count, self.original.num_classes, device=device, dtype=self.original.mean.dtype)
        with progress(f"the teacher's logits of {count:,} images", count) as advance:
            for numbers_B, pixels_BCHW in images:
                pixels_BCHW = pixels_BCHW.to(device)
                _, teacher = self._folded(pixels_BCHW[:2])
                logits_NC[numbers_B.to(device)] = self._teacher_logits(autocast, teacher, pixels_BCHW).to(logits_NC)
                advance(len(numbers_B) * processes.world_size)
        self._cached_logits_NC = processes.total(logits_NC)

    def forward(self, step: Step) -> dict[str, Tensor]:
        return self.terms(step, step.all_weights())

    def terms(self, step: Step, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The loss terms of the original's architecture with these weights."""
        images_BCHW = step.images()
        student, teacher = self._folded(images_BCHW[:2])
        terms: dict[str, Tensor] = {}
        if self.feature_weight:
            tapped = FeatureTaps(student.net, self.taps)
            with tapped.collect() as student_maps:
                student_BC = _logits(step.autocast, student, images_BCHW, weights)
            with tapped.collect() as original_maps, torch.no_grad():
                original_BC = _logits(step.autocast, student, images_BCHW)
            terms["features"] = self.feature_weight * feature_map_loss(student_maps, original_maps)
        else:
            student_BC = _logits(step.autocast, student, images_BCHW, weights)
        if self.kd_weight:
            if self._cached_logits_NC is not None:
                teacher_BC = self._cached_logits_NC[step.numbers()]
            else:
                known_BC = original_BC if self.feature_weight and teacher is student else None
                teacher_BC = self._teacher_logits(step.autocast, teacher, images_BCHW, known_BC)
            divergence = kd_loss(student_BC, teacher_BC, temperature=self.temperature, inside_log=self.kd_inside_log)
            terms["kd"] = self.kd_weight * divergence
        if self.cross_entropy_weight:
            terms["cross_entropy"] = self.cross_entropy_weight * cross_entropy(
                student_BC, _labels(step.batch, self.original.num_classes)
            )
        if self.recon_weight:
            terms["recon"] = self.recon_weight * full_reconstruction_error(
                step.representation, weights, "mse", step.error_weights, step.filter_errors
            )
        return terms

    def _teacher_logits(
        self, autocast: Autocast, teacher: Folded, images_BCHW: Tensor, known_BC: Tensor | None = None
    ) -> Tensor:
        """The teacher's logits (B, C).

        Args:
            autocast: Returns the context of the precision of training steps.
            teacher: The teacher.
            images_BCHW: The images.
            known_BC: Its logits for the unflipped images, if they have been computed already.
        """
        with torch.inference_mode():
            logits = [] if known_BC is None else [known_BC]
            batches = [images_BCHW] if known_BC is None else []
            if self.teacher_flip:
                batches.append(images_BCHW.flip(3))
            if batches:  # one forward pass: on a GPU, small networks are limited by kernel launches
                logits += _logits(autocast, teacher, torch.cat(batches)).split(len(images_BCHW))
            mean_BC = torch.stack(logits).mean(0)
        return mean_BC.clone()  # autograd cannot keep inference tensors

    def _folded(self, images_BCHW: Tensor) -> tuple[Folded, Folded]:
        """The student and the teacher with folded BatchNorm layers; they are built at the first call.

        Args:
            images_BCHW: A small batch, which is used to trace which BatchNorm follows which convolution.
        """
        if self._networks is None:
            read = FeatureTaps(self.original.net, self.taps).taps if self.feature_weight else ()
            student = Folded(self.original, images_BCHW, read)
            self._networks = student, student if self.teacher is None else Folded(self.teacher, images_BCHW)
        return self._networks


def _logits(
    autocast: Autocast, cnn: Folded, images_BCHW: Tensor, weights: Mapping[str, Tensor] | None = None
) -> Tensor:
    """Logits (B, C); images are converted to channels-last memory format, in which convolutions are fastest."""
    with autocast():
        return cnn(images_BCHW.contiguous(memory_format=torch.channels_last), weights)


def _labels(batch: tuple[Tensor, Tensor], num_classes: int) -> Tensor:
    if batch[1].device.type == "cpu" and bool((batch[1] < 0).any()):  # elsewhere the step would wait for the device
        raise UsageError(NO_LABELS)
    return labels_of(batch, num_classes)
