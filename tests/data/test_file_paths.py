"""Paths of a million images: little memory, and the same files."""

import gc
import os
import pickle
from pathlib import Path

import torch

from nernlit.data.file_paths import FilePaths
from nernlit.data.trees import tree_images
from tests.fakes import write_image_folder


def test_paths_are_those_that_were_given() -> None:
    given = [Path("a", "b.png"), Path("/ü", os.fsdecode(b"\xff\n.png")), Path("c")]
    paths = FilePaths.from_paths(given)
    assert list(paths) == given
    assert list(paths[1:]) == given[1:]
    assert list(paths.subset(torch.tensor([2, 0, 0]))) == [given[2], given[0], given[0]]
    assert list(FilePaths.from_paths([])) == []


def test_a_path_takes_a_few_bytes_more_than_its_characters() -> None:
    names = [f"train/n{number % 10:08d}/{number:08d}.JPEG" for number in range(20_000)]
    paths = FilePaths.from_paths(names)
    assert len(pickle.dumps(paths)) < len("".join(names)) + 24 * len(names)
    part = paths.subset(torch.arange(0, 20_000, 2))
    assert part._characters is paths._characters  # shared, not copied
    assert str(part[9_999]) == names[19_998]


def test_listing_images_leaves_no_object_per_image(tmp_path: Path) -> None:
    folder = write_image_folder(tmp_path, 2, 1, ("train",)) / "train"
    for number in range(300):
        (folder / "class000" / f"{number}.jpg").touch()
    tree_images(folder, {"class000": 0}, None)  # loads PIL's formats
    gc.collect()
    before = len(gc.get_objects())
    images = tree_images(folder, {"class000": 0, "class001": 1}, None)
    half = images.subset(torch.arange(0, len(images), 2))
    gc.collect()
    assert len(gc.get_objects()) - before < 100
    assert (len(images), len(half)) == (302, 151)
