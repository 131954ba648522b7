"""The classes of CIFAR-10 and CIFAR-100 in their published order, and the folder names that denote them."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from nernlit.errors import DataError
from nernlit.utilities.text import abbreviated

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

CIFAR100_CLASSES = (
    *("apple", "aquarium_fish", "baby", "bear", "beaver", "bed", "bee", "beetle", "bicycle", "bottle", "bowl", "boy"),
    *("bridge", "bus", "butterfly", "camel", "can", "castle", "caterpillar", "cattle", "chair", "chimpanzee", "clock"),
    *("cloud", "cockroach", "couch", "crab", "crocodile", "cup", "dinosaur", "dolphin", "elephant", "flatfish"),
    *("forest", "fox", "girl", "hamster", "house", "kangaroo", "keyboard", "lamp", "lawn_mower", "leopard", "lion"),
    *("lizard", "lobster", "man", "maple_tree", "motorcycle", "mountain", "mouse", "mushroom", "oak_tree", "orange"),
    *("orchid", "otter", "palm_tree", "pear", "pickup_truck", "pine_tree", "plain", "plate", "poppy", "porcupine"),
    *("possum", "rabbit", "raccoon", "ray", "road", "rocket", "rose", "sea", "seal", "shark", "shrew", "skunk"),
    *("skyscraper", "snail", "snake", "spider", "squirrel", "streetcar", "sunflower", "sweet_pepper", "table", "tank"),
    *("telephone", "television", "tiger", "tractor", "train", "trout", "tulip", "turtle", "wardrobe", "whale"),
    *("willow_tree", "wolf", "woman", "worm"),
)

_PLURALS = ("orchid", "rose", "sunflower", "tulip", "bottle", "bowl", "can", "cup", "plate", "apple", "mushroom")
_TREES = ("maple", "oak", "palm", "pine", "willow")
#: Other names in use; those of CIFAR-100 are the ones on the dataset's web page.
_ALIASES: Mapping[str, str] = MappingProxyType(
    {
        "plane": "airplane",
        "aeroplane": "airplane",
        "car": "automobile",
        "auto": "automobile",
        "computer_keyboard": "keyboard",
        "poppies": "poppy",
        **{name: f"{name}_tree" for name in _TREES},
        **{f"{name}s": name for name in (*_PLURALS, "orange", "pear", "sweet_pepper")},
    }
)


def published_labels(folders: Sequence[str], classes: Sequence[str], place: str) -> dict[str, int]:
    """The published label of each class folder.

    A folder has its class's name or a common alias (plane, car), in any case and with spaces, hyphens or underscores,
    or its label's number (3, 03).

    Args:
        folders: Names of the class folders.
        classes: Names of the classes, in the order of their labels.
        place: Path of the folders, for messages.

    Raises:
        DataError: If there is not exactly one folder per class.

    >>> published_labels(["Car", "0"], ["airplane", "automobile"], "data/train")
    {'Car': 1, '0': 0}
    """
    labels: dict[str, int] = {}
    for folder in folders:
        label = _label(folder, classes)
        if label is None:
            raise DataError(
                f"{place}/{folder} is no class of this dataset, so its label is unknown; expected {len(classes)} "
                f"folders with the published names ({', '.join(classes[:3])}, ..., {classes[-1]}) or with the labels "
                f"0 to {len(classes) - 1}. For other classes use FolderDataModule."
            )
        same = [other for other, taken in labels.items() if taken == label]
        if same:
            raise DataError(f"{place} has {same[0]} and {folder} for the class {classes[label]!r}; keep one folder.")
        labels[folder] = label
    missing = [name for label, name in enumerate(classes) if label not in labels.values()]
    if missing:
        raise DataError(
            f"{place} has no folder for {len(missing)} of the {len(classes)} classes: {abbreviated(missing)}."
        )
    return labels


def _label(folder: str, classes: Sequence[str]) -> int | None:
    name = folder.lower().replace(" ", "_").replace("-", "_")
    if name.isascii() and name.isdigit():
        return int(name) if int(name) < len(classes) else None
    known = {**{alias: own for alias, own in _ALIASES.items() if own in classes}, **{own: own for own in classes}}
    return classes.index(known[name]) if name in known else None
