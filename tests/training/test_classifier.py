"""The accuracies that every module reports, and their names."""

from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

from nernlit.callbacks import Summary
from nernlit.data import DigitsDataModule, EvalSet
from nernlit.data.sources import ImageSource
from nernlit.errors import DataError, UsageError
from nernlit.training import ReconOnly
from tests.fakes import digits_representation, quiet_trainer, tiny_representation


class Named(EvalSet):
    """The clean images under given names."""

    name = ""

    def __init__(self, name: str, *conditions: str) -> None:
        self.name, self.names = name, conditions  # type: ignore[misc]

    def conditions(self, clean: ImageSource, num_classes: int) -> dict[str, ImageSource]:
        return dict.fromkeys(self.names, clean)


def _test(*eval_sets: EvalSet) -> dict[str, float]:
    trainer = quiet_trainer(callbacks=[Summary()])
    module = ReconOnly(tiny_representation(), optimizer=torch.optim.Adam)
    trainer.test(module, DigitsDataModule(eval_sets=eval_sets), verbose=False)
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def test_names_of_test_sets_may_hold_dots() -> None:
    metrics = _test(Named("cifar10.1", "v6.0", "v4"), Named("a/b c", "d"))
    names = ("cifar10.1", "cifar10.1_v6.0", "cifar10.1_v4", "a/b c", "a/b c_d")
    for suffix in ("", "_original"):
        for name in names:
            assert metrics[f"test/acc_{name}{suffix}"] == metrics[f"test/acc{suffix}"]


@pytest.mark.parametrize(
    ("eval_sets", "name"),
    [
        ([Named("a", "b_c"), Named("a_b", "c")], "acc_a_b_c"),
        ([Named("original", "x")], "acc_original"),
        ([Named("top5", "x")], "acc_top5"),
        ([Named("a", "original")], "acc_a_original"),
        ([Named("a", "b"), Named("a_b", "c")], "acc_a_b"),
    ],
)
def test_results_of_one_name_are_refused(eval_sets: list[EvalSet], name: str) -> None:
    with pytest.raises(UsageError, match=f"eval_sets: two results would be named {name}; rename the test set"):
        _test(*eval_sets)


def test_evaluations_do_not_add_up() -> None:
    data = DigitsDataModule()
    module = ReconOnly(tiny_representation(), optimizer=torch.optim.Adam)
    first, again = (quiet_trainer().test(module, data, verbose=False)[0]["test/acc_original"] for _ in range(2))
    assert first == again


def test_images_of_other_channels_from_elsewhere_are_refused() -> None:
    loader = DataLoader(TensorDataset(torch.zeros(4, 3, 8, 8), torch.zeros(4, dtype=torch.int64)), batch_size=4)
    module = ReconOnly(tiny_representation(), optimizer=torch.optim.Adam)
    with pytest.raises(DataError, match=r"images of 3 channels, but the original takes 1; .* which converts them"):
        quiet_trainer().test(module, loader, verbose=False)


class _Pairs(Dataset[Any]):
    """One batch of a user's own datamodule, as given."""

    def __init__(self, batch: Any) -> None:
        self.batch = batch

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Any:
        return self.batch


_IMAGES, _LABELS = torch.rand(4, 1, 8, 8), torch.arange(4)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"image": _IMAGES, "label": _LABELS}, "a batch is a dict; expected \\(images, labels\\): float32 pixels"),
        ([_IMAGES], r"a batch consists of \(Tensor\); expected \(images, labels\)"),
        ([_IMAGES, "cat"], r"a batch consists of \(Tensor, str\)"),
        ([(255 * _IMAGES).byte(), _LABELS], r"the images of a batch are uint8 of shape \(4, 1, 8, 8\)"),
        ([_IMAGES.double(), _LABELS], "the images are float64, but .* is float32; convert the images"),
        ([_IMAGES[0], _LABELS], r"the images of a batch are float32 of shape \(1, 8, 8\)"),
        ([_IMAGES, torch.eye(10)[:4]], r"the labels of a batch are float32 of shape \(4, 10\)"),
        ([_IMAGES, _LABELS + 7], "labels are from 7 to 10; expected 0 to 9"),
        ([_IMAGES, _LABELS - 1], "labels are from -1 to 2; expected 0 to 9"),
        ([4 * _IMAGES - 2, _LABELS], r"the pixels of a batch are from .* expected pixels in \[0, 1\]"),
    ],
)
def test_batches_of_another_form_are_refused(batch: Any, message: str) -> None:
    module = ReconOnly(digits_representation(), optimizer=torch.optim.Adam)
    with pytest.raises(DataError, match=message):
        quiet_trainer().test(module, DataLoader(_Pairs(batch), batch_size=None), verbose=False)


def test_labels_of_any_integer_type_are_taken() -> None:
    module = ReconOnly(digits_representation(), optimizer=torch.optim.Adam)
    found = [
        quiet_trainer().test(module, DataLoader(_Pairs([_IMAGES, labels]), batch_size=None), verbose=False)[0]
        for labels in (_LABELS, _LABELS.int(), _LABELS.byte())
    ]
    assert found[0] == found[1] == found[2]


def test_a_validation_returns_its_figures() -> None:
    module = ReconOnly(digits_representation(), optimizer=torch.optim.Adam)
    (found,) = quiet_trainer().validate(module, DigitsDataModule(), verbose=False)
    assert {"val/acc", "val/acc_original", "val/recon_rmse"} <= found.keys()
