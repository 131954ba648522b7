from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import nernlit
from nernlit.errors import CheckpointError, UsageError
from nernlit.predictors import MLP, Table
from nernlit.representation import Representation, load_representation
from nernlit.training import DecoupledDistill, ReconOnly
from tests.fakes import digits_representation, quiet_trainer, tiny_original


def _adam(parameters: Iterator[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=1e-2)


def _table(tune_kept: str) -> Representation:
    return Representation(digits_representation().original, Table(), order="none", tune_kept=tune_kept)  # type: ignore[arg-type]


def _fitted(representation: Representation) -> Representation:
    images, labels = torch.rand(8, 1, 8, 8), torch.randint(0, 10, (8,))
    module = DecoupledDistill(representation, optimizer=_adam, kd_weight=0, cross_entropy_weight=1, precision="fp32")
    quiet_trainer(max_steps=3).fit(module, DataLoader([(images, labels)] * 3, batch_size=None))  # type: ignore[arg-type]
    return representation.eval()


@pytest.mark.parametrize(
    ("tune_kept", "dimensions"), [("none", set()), ("affine", {1}), ("all", {1, 2})], ids=["none", "affine", "all"]
)
def test_the_option_chooses_what_is_trained(tune_kept: str, dimensions: set[int]) -> None:
    representation = _fitted(_table(tune_kept))
    before, after = representation.original.net.state_dict(), representation.reconstructed()
    predicted = {layer.key for layer in representation.layout.layers}
    for key, value in representation.original.net.named_parameters():
        if key not in predicted:
            assert torch.equal(after[key], before[key]) == (value.dim() not in dimensions), key


def test_training_and_evaluation_use_the_trained_tensors(tmp_path: Path) -> None:
    representation = _fitted(_table("all"))
    images = torch.rand(5, 1, 8, 8)
    expected = representation.module()((images - representation.original.mean) / representation.original.std)
    assert torch.allclose(representation(images), expected, atol=1e-5)
    representation.save(tmp_path / "net.nern")
    assert torch.allclose(nernlit.load(tmp_path / "net.nern")(images), expected, atol=1e-5)


def test_a_file_gives_its_trained_tensors_to_a_new_representation(tmp_path: Path) -> None:
    representation = _fitted(_table("affine"))
    representation.save(tmp_path / "net.nern")
    again, _ = load_representation(tmp_path / "net.nern", _table("affine"))
    for key, value in representation.tuned.named().items():
        assert torch.equal(again.tuned.named()[key], value)


def test_a_fit_of_affine_tensors_continues_with_all(tmp_path: Path) -> None:
    images, labels = torch.rand(8, 1, 8, 8), torch.randint(0, 10, (8,))
    representation = _table("affine")
    module = DecoupledDistill(representation, optimizer=_adam, kd_weight=0, cross_entropy_weight=1, precision="fp32")
    trainer = quiet_trainer(max_steps=1)
    trainer.fit(module, DataLoader([(images, labels)], batch_size=None))  # type: ignore[arg-type]
    trainer.save_checkpoint(tmp_path / "affine.ckpt")
    again, _ = load_representation(tmp_path / "affine.ckpt", _table("all"))
    trained, everything = representation.tuned.named(), again.tuned.named()
    assert set(trained) < set(everything)
    for key, value in everything.items():
        assert torch.equal(value, trained.get(key, again.original.net.state_dict()[key])), key


def test_they_have_a_smaller_learning_rate() -> None:
    representation = _table("affine")
    assert set(representation.learning_rates().values()) == {0.1}
    assert set(representation.learning_rates()) == set(representation.tuned.parameters())


def test_a_scheme_without_images_refuses_to_train_them() -> None:
    with pytest.raises(UsageError, match="tune_kept chooses tensors that only images have an effect on"):
        ReconOnly(_table("affine"), _adam)


def test_an_unknown_choice_is_refused() -> None:
    with pytest.raises(UsageError, match="tune_kept='some'; expected one of none, affine, all"):
        Representation(tiny_original(), MLP(8, kernel_size=5), tune_kept="some")  # type: ignore[arg-type]


def test_a_checkpoint_with_more_trained_tensors_is_refused(tmp_path: Path) -> None:
    images, labels = torch.rand(8, 1, 8, 8), torch.randint(0, 10, (8,))
    module = DecoupledDistill(_table("affine"), optimizer=_adam, precision="fp32")
    trainer = quiet_trainer(max_steps=1)
    trainer.fit(module, DataLoader([(images, labels)], batch_size=None))  # type: ignore[arg-type]
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    with pytest.raises(CheckpointError, match="more trained kept tensors; pass the same"):
        load_representation(tmp_path / "last.ckpt", _table("none"))
