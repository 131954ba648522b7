"""Trees of image files, `<folder>/<class>/<image>`: their classes and files."""

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from lightning.pytorch.utilities import rank_zero_warn

from nernlit.data.decode import ResizeCenterCrop, image_suffixes
from nernlit.data.file_paths import FilePaths
from nernlit.data.sources import FileImages
from nernlit.errors import DataError
from nernlit.utilities.progress import progress
from nernlit.utilities.text import abbreviated

#: Files that operating systems create in folders.
_CLUTTER = {"thumbs.db", "desktop.ini"}


def class_folders(folder: Path) -> list[str]:
    """The class names of a tree: its sub-folders, sorted, without those that begin with a dot.

    Raises:
        DataError: If there are none.
    """
    try:
        with os.scandir(folder) as entries:
            classes = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        raise DataError(f"cannot list {folder} ({error.strerror}); expected {folder}/<class>/<image>.") from error
    if not classes:
        raise DataError(f"{folder} has no class folders; expected {folder}/<class>/<image> with one folder per class.")
    return classes


def shared_classes(folders: Sequence[Path]) -> list[str]:
    """The class names of several trees, which must be the same.

    Raises:
        DataError: If one has others than the first, or none.
    """
    first, *others = folders
    classes = class_folders(first)
    for other in others:
        found = class_folders(other)
        if found != classes:
            odd = sorted(set(found) ^ set(classes))
            raise DataError(
                f"{other} has {len(found)} class folders, {first} has {len(classes)}; they differ in "
                f"{abbreviated(odd)}. Every split needs the same class folders."
            )
    return classes


def tree_images(
    folder: Path,
    labels: Mapping[str, int],
    fitting: ResizeCenterCrop | None,
    channels: int | None = None,
    empty_classes: bool = False,
) -> FileImages:
    """The images of a tree.

    Files and folders whose names begin with a dot are ignored. A warning counts other files that are not images.

    Args:
        folder: The folder of the class folders.
        labels: The label of each class folder.
        fitting: Resizes and crops each image to one size; None keeps the files' own sizes.
        channels: 1, 3 or 4; RGB by default.
        empty_classes: Warn of a class without images instead of refusing it.

    Raises:
        DataError: If a class has no image, or a folder cannot be read.
    """
    left_out: Counter[str] = Counter()
    counts: dict[str, int] = dict.fromkeys(labels, 0)

    def images() -> Iterator[str]:
        with progress(f"listing the images of {folder}", len(labels)) as advance:
            for name in labels:
                for path in _files(folder / name):
                    suffix = os.path.splitext(path)[1].lower()
                    if suffix in image_suffixes():
                        counts[name] += 1
                        yield path
                    else:
                        left_out[suffix or "without suffix"] += 1
                advance(1)

    paths = FilePaths.from_paths(images())
    if left_out:
        kinds = abbreviated(
            [f"{left_out[suffix]:,} {suffix}" for suffix in sorted(left_out, key=lambda s: (-left_out[s], s))]
        )
        rank_zero_warn(f"{folder}: ignored files that are not images: {kinds}.")
    if empty := [name for name, count in counts.items() if not count]:
        message = f"{folder}: no image in {abbreviated(empty)} ({len(empty)} of {len(labels)} classes)"
        if not paths or not empty_classes:
            raise DataError(f"{message}; expected at least one image per class (.jpg, .png, .tif, ...).")
        rank_zero_warn(f"{message}.")
    numbers = torch.tensor(list(labels.values())).repeat_interleave(torch.tensor(list(counts.values())))
    return FileImages(paths, numbers, fitting, channels)


def _files(folder: Path) -> list[str]:
    """All files below a folder, sorted, without hidden files and those that operating systems create.

    Links to folders are followed, as by torchvision; a folder that contains itself is listed once.
    """

    def refuse(error: OSError) -> None:
        raise DataError(f"cannot list {error.filename} ({error.strerror}).") from error

    found = []
    containing: dict[str, frozenset[str]] = {}  # a folder -> where it and those that contain it are
    for place, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        above = containing.pop(place, frozenset()) | {os.path.realpath(place)}
        folders[:] = [
            name
            for name in folders
            if not name.startswith(".") and os.path.realpath(os.path.join(place, name)) not in above
        ]
        containing |= dict.fromkeys((os.path.join(place, name) for name in folders), above)
        shown = [name for name in names if not name.startswith(".") and name.lower() not in _CLUTTER]
        found += [os.path.join(place, name) for name in shown]
    return sorted(found, key=lambda path: path.split(os.sep))
