"""Accuracy under attack, beside clean accuracy in the same `test`."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, final

import lightning as L
import torch
from torch import Tensor

from nernlit.analysis import Attack
from nernlit.representation import Representation


@final
class AdversarialAccuracy(L.Callback):
    """Attack the original and the reconstructed CNN, each itself and with the same strength, on the test images.

    Logs `test/acc_fgsm_EPS` and `test/acc_ifgsm_EPS`, the original's with `_original` behind; EPS is in 1/255.
    `nernlit.analysis.calibrate` finds an EPS.

    Args:
        fgsm_255: Strengths of attacks in one step.
        ifgsm_255: Strengths of iterated attacks.
        steps: Of an iterated attack.
        step_255: Its change in a step; a quarter of its strength by default.
    """

    def __init__(
        self,
        fgsm_255: Sequence[float] = (0.25, 1.0),
        ifgsm_255: Sequence[float] = (0.25, 1.0),
        steps: int = 10,
        step_255: float | None = None,
    ) -> None:
        self.attacks = [Attack(eps) for eps in fgsm_255] + [Attack(eps, steps, step_255) for eps in ifgsm_255]
        self._networks: dict[str, Callable[[Tensor], Tensor]] = {}

    def on_test_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        representation = getattr(pl_module, "representation", None)
        self._networks = {}
        if not isinstance(representation, Representation):
            return
        # Ordinary tensors: autograd refuses what is made in inference mode.
        with torch.inference_mode(False), torch.no_grad():
            weights = representation.weights()
        self._networks = {"": partial(representation, weights=weights), "_original": representation.original}
        self._right = torch.zeros(len(self.attacks), len(self._networks), device=pl_module.device, dtype=torch.long)
        self._count = torch.zeros((), device=pl_module.device, dtype=torch.long)

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if dataloader_idx or not self._networks:
            return
        images_BCHW, labels_B = batch
        self._count += len(labels_B)
        for row, attack in enumerate(self.attacks):
            for column, classify in enumerate(self._networks.values()):
                answers_B = classify(attack(classify, images_BCHW, labels_B)).argmax(1)
                self._right[row, column] += (answers_B == labels_B).sum()

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self._networks:
            return
        right, count = (trainer.strategy.reduce(values, reduce_op="sum") for values in (self._right, self._count))
        for row, attack in enumerate(self.attacks):
            for column, suffix in enumerate(self._networks):
                pl_module.log(f"test/acc_{attack.name}{suffix}", right[row, column] / count, sync_dist=True)
        self._networks = {}  # as large as the network
