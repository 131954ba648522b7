"""Accuracy under adversarial attacks, measured in `test` together with clean accuracy."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, final

import lightning as L
import torch
from torch import Tensor

from nernlit.analysis.attacks import Attack, count_unchanged, warn_unchanged
from nernlit.analysis.paired import is_correct
from nernlit.errors import UsageError, require_at_least
from nernlit.originals import Folded, Original
from nernlit.representation import Representation


@final
class AdversarialAccuracy(L.Callback):
    """Accuracy of the original and of the reconstructed CNN on attacked test images, in white-box attacks on each.

    Logs `test/acc_fgsm_EPS` and `test/acc_ifgsm_EPS`, and the same with the suffix `_original`; EPS is in units of
    1/255. A module that trains an original has one network, without a suffix. Warns if an attack did not change some of
    the images. `nernlit.analysis.find_eps` finds an EPS.

    Args:
        fgsm_255: Strengths of FGSM (one step), in units of 1/255.
        ifgsm_255: Strengths of I-FGSM (several steps), in units of 1/255.
        steps: Steps of I-FGSM.
        step_255: Change per step of I-FGSM, in units of 1/255; a quarter of the strength by default.
    """

    def __init__(
        self,
        fgsm_255: Sequence[float] = (0.25, 1.0),
        ifgsm_255: Sequence[float] = (0.25, 1.0),
        steps: int = 10,
        step_255: float | None = None,
    ) -> None:
        if ifgsm_255:
            require_at_least(2, steps=steps)
        self.attacks = [Attack(eps) for eps in fgsm_255] + [Attack(eps, steps, step_255) for eps in ifgsm_255]
        names = [attack.name for attack in self.attacks]
        if len(set(names)) < len(names):
            raise UsageError(f"fgsm_255={list(fgsm_255)}, ifgsm_255={list(ifgsm_255)}: give every strength only once.")
        self._forget()

    def _forget(self) -> None:
        self._attacked: Representation | Original | None = None
        self._suffixes: tuple[str, ...] = ()
        self._networks: dict[str, Callable[[Tensor], Tensor]] = {}  # holds a copy of the network's weights

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "test" and not getattr(pl_module, "has_images", True):
            raise UsageError(
                "AdversarialAccuracy attacks test images, and there are none (`data: null`); leave it out."
            )

    def on_test_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._forget()
        attacked = getattr(pl_module, "representation", getattr(pl_module, "original", None))
        self._attacked = attacked if isinstance(attacked, Representation | Original) else None
        self._suffixes = ("",) if isinstance(attacked, Original) else ("", "_original")
        shape = (len(self.attacks), len(self._suffixes))
        self._correct = torch.zeros(shape, device=pl_module.device, dtype=torch.long)
        self._unchanged = torch.zeros_like(self._correct)
        self._count = torch.zeros((), device=pl_module.device, dtype=torch.long)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._forget()

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if dataloader_idx or self._attacked is None:
            return
        images_BCHW, labels_B = batch
        if not self._networks:
            self._networks = _networks(self._attacked, images_BCHW)
        self._count += len(labels_B)
        for row, attack in enumerate(self.attacks):
            for column, suffix in enumerate(self._suffixes):
                classify = self._networks[suffix]
                attacked_BCHW = attack(classify, images_BCHW, labels_B)
                self._correct[row, column] += is_correct(classify(attacked_BCHW), labels_B).sum()
                self._unchanged[row, column] += count_unchanged(images_BCHW, attacked_BCHW)

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._attacked is None:
            return
        correct, unchanged, count = (
            trainer.strategy.reduce(values, reduce_op="sum") for values in (self._correct, self._unchanged, self._count)
        )
        for row, attack in enumerate(self.attacks):
            for column, suffix in enumerate(self._suffixes):
                pl_module.log(f"test/acc_{attack.name}{suffix}", correct[row, column] / count, sync_dist=True)
                if trainer.is_global_zero:
                    network = (
                        "reconstructed" if isinstance(self._attacked, Representation) and not suffix else "original"
                    )
                    warn_unchanged(attack, int(unchanged[row, column]), int(count), f"{network} network")
        self._forget()


def _networks(attacked: Representation | Original, images_BCHW: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
    if isinstance(attacked, Original):
        return {"": Folded(attacked, images_BCHW[:2])}
    original = Folded(attacked.original, images_BCHW[:2])
    # Outside of inference mode: autograd refuses tensors that were created in it.
    with torch.inference_mode(False), torch.no_grad():
        weights = attacked.entries()
    return {"": partial(original, weights=weights), "_original": original}
