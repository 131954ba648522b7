"""The folder of a run: created by one process, written by one fit at a time, removed if the fit fails to start."""

import fcntl
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from nernlit.errors import StorageError, UsageError
from nernlit.storage.files import remove_unfinished

#: What a fit writes before its first step.
_OF_A_START = ("config.yaml", "hparams.yaml", "events.out.tfevents.*")


@contextmanager
def claimed_folder(loggers: Sequence[Logger], numbered: bool, fits: bool, resumes: bool = False) -> Iterator[None]:
    """Create and lock the run's folder while a command runs. Only the first process does; the others get its name.

    Args:
        loggers: The first one has the run's folder. One that is not TensorBoard's chooses it itself, and nothing is
            done. Others with the same name and `save_dir` get the same folder.
        numbered: Whether the folder is the next free `version_N`; otherwise the configuration names it.
        fits: Whether the command is `fit`, which has the folder to itself.
        resumes: Whether it continues a fit.

    Raises:
        StorageError: If the folder cannot be made.
        UsageError: If another fit is writing into it, or has checkpoints in it that a new one would replace.
    """
    for each in loggers:
        if isinstance(each, CSVLogger):
            _keep_metrics(Path(each.log_dir))
    logger = loggers[0] if loggers else None
    if not isinstance(logger, TensorBoardLogger) or getattr(rank_zero_only, "rank", 0) != 0:
        yield
        return
    folder, made = _make(logger, numbered)
    for other in loggers[1:]:
        if isinstance(other, TensorBoardLogger | CSVLogger) and numbered and other.root_dir == logger.root_dir:
            other._version = logger.version
    lock = os.open(folder, os.O_RDONLY)
    try:
        if fits:
            _lock(lock, folder)
            if not resumes and (last := folder / "checkpoints" / "last.ckpt").is_file():
                raise UsageError(
                    f"{last} of an earlier fit would be replaced; continue that fit (--ckpt_path last), or pass "
                    "another --trainer.logger.version."
                )
            remove_unfinished(folder.parent.rglob("*"))  # also in runs that were killed before their first checkpoint
        yield
    except BaseException:
        if made and _holds_nothing(folder):
            shutil.rmtree(folder, ignore_errors=True)
            with suppress(OSError):
                folder.parent.rmdir()  # where it is empty
        raise
    finally:
        os.close(lock)


def refuse_replaced_checkpoints(trainer: L.Trainer) -> None:
    """Refuse a new fit whose checkpoints would replace those of an earlier one.

    Raises:
        UsageError: With the name of such a checkpoint.
    """
    for callback in trainer.checkpoint_callbacks:
        if not isinstance(callback, ModelCheckpoint) or callback._enable_version_counter:
            continue
        if callback.dirpath is None and isinstance(trainer.logger, TensorBoardLogger):
            continue  # in the folder that `claimed_folder` checks, once it has the lock
        folder = Path(callback._ModelCheckpoint__resolve_ckpt_dir(trainer))  # type: ignore[attr-defined]
        if callback.filename and (file := folder / f"{callback.filename}.ckpt").is_file():
            raise UsageError(
                f"{file} of an earlier fit would be replaced; continue that fit (--ckpt_path FILE), or pass another "
                "folder (--trainer.default_root_dir, or dirpath of best_checkpoint and last_checkpoint)."
            )


def _keep_metrics(folder: Path) -> None:
    """Rename the table that an earlier command wrote into this folder: Lightning's `CSVLogger` would delete it."""
    table = folder / "metrics.csv"
    if table.is_file() and getattr(rank_zero_only, "rank", 0) == 0:
        number = next(number for number in count(1) if not (folder / f"metrics_{number}.csv").exists())
        table.rename(folder / f"metrics_{number}.csv")


def _make(logger: TensorBoardLogger, numbered: bool) -> tuple[Path, bool]:
    """The logger's folder, and whether this made it."""
    while True:
        folder = Path(logger.log_dir)
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            folder.mkdir()
        except FileExistsError:
            if not numbered and folder.is_dir():
                return folder, False
            if not numbered or not folder.parent.is_dir():
                raise StorageError(f"cannot make {folder}: there is a file of that name.") from None
            # Another run took this version number after the logger chose it; the logger has no public way to change it.
            logger._version = int(logger.version) + 1
        except OSError as error:
            raise StorageError(
                f"cannot make {folder}: {error.strerror}; choose another folder (--trainer.logger.save_dir)."
            ) from error
        else:
            return folder, True


def _lock(descriptor: int, folder: Path) -> None:
    """Refuse a second fit. The operating system releases the lock when the process ends for any reason."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UsageError(
            f"another fit is writing into {folder}; wait for it, or start a new run (without --ckpt_path and version)."
        ) from None
    except OSError:
        return  # a filesystem without locks


def _holds_nothing(folder: Path) -> bool:
    files = [path for path in folder.rglob("*") if not path.is_dir()]
    return all(any(file.match(pattern) for pattern in _OF_A_START) for file in files)
