"""The last checkpoint of a fit."""

from typing import Any, final

from lightning.pytorch.callbacks import ModelCheckpoint


@final
class LastCheckpoint(ModelCheckpoint):
    """Saves `last.ckpt` after each epoch, one file, also after a fit is resumed.

    It is a class of its own so that a user's `ModelCheckpoint` with the same options has another state in checkpoints.
    `save_last` of `ModelCheckpoint` would save only those that are also among the best.

    Args:
        kwargs: See `ModelCheckpoint`.
    """

    def __init__(
        self,
        filename: str | None = "last",
        save_on_train_epoch_end: bool | None = True,
        enable_version_counter: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            filename=filename,
            save_on_train_epoch_end=save_on_train_epoch_end,
            enable_version_counter=enable_version_counter,
            **kwargs,
        )
