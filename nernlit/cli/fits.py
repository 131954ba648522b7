"""Fits that other commands make: each continues where an earlier call of the same command was interrupted."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import final

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from nernlit.cli.arguments import refuse_own_options
from nernlit.cli.configs import config_fingerprint
from nernlit.cli.main import NernlitCLI, run
from nernlit.errors import UsageError
from nernlit.training import refuse_averaging

_LOGGER = "--trainer.logger"
#: Options that name a fit's folder or its checkpoint -> what to do instead.
_OWN_OPTIONS = dict.fromkeys(
    ("--ckpt_path", _LOGGER, *(f"{_LOGGER}.{name}" for name in ("save_dir", "name", "version"))),
    "it chooses the folders of its fits; leave it out",
)


def epoch_options(epochs: int) -> list[str]:
    """The options of a fit of `epochs` epochs with about five validations."""
    return [f"--trainer.max_epochs={epochs}", f"--trainer.check_val_every_n_epoch={max(1, epochs // 5)}"]


@final
class SavedAtEnd(Callback):
    """Refuse what does not work in a fit whose network in memory is written to a file at its end.

    Args:
        command: The command that makes the fit, for messages.
    """

    def __init__(self, command: str) -> None:
        self.command = command

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.world_size > 1:
            raise UsageError(
                f"`{self.command}` works in one process, and there are {trainer.world_size} (--trainer.devices, "
                "--trainer.num_nodes); leave these options out."
            )
        # A fit that is continued after its end has no average.
        refuse_averaging(trainer, "the network that is written to the file; pass --model.ema 0.99 instead")


def continued_fit(
    options: Sequence[str], folder: Path, name: str, weights: str = "", callbacks: Sequence[Callback] = ()
) -> NernlitCLI:
    """Run a fit, or continue it.

    A hash of its options, of the contents of its configuration files and of `weights` is part of the name of its
    folder.

    Args:
        options: `fit` and its options.
        folder: Where the fit's folder is.
        name: What the name of the fit's folder starts with.
        weights: The original's fingerprint: a file of weights may change under its name.
        callbacks: Further ones.

    Raises:
        UsageError: If an option is set here.
    """
    refuse_own_options(_OWN_OPTIONS, options)
    key = repr([*options, config_fingerprint(options), weights])
    name = f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:8]}"
    last = ["--ckpt_path=last"] if any((folder / name).glob("version_*/checkpoints/last.ckpt")) else []
    return run([*options, f"{_LOGGER}.save_dir={folder}", f"{_LOGGER}.name={name}", *last], callbacks)
