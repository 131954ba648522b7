from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader

import nernlit
from nernlit.errors import CheckpointError, UsageError
from nernlit.kernels import Uniform
from nernlit.predictors import MLP, Table
from nernlit.representation import Representation, load_representation
from nernlit.training import BaselineJoint, DecoupledDistill, ReconOnly
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


@pytest.mark.parametrize("kept", ["fp32", "int8"])
def test_a_file_with_folded_batch_norm_gives_its_network_to_a_new_representation(tmp_path: Path, kept: str) -> None:
    representation = _fitted(_table("affine"))
    representation.save(tmp_path / "net.nern", kept=kept, fold_batch_norm=True)  # type: ignore[arg-type]
    again, _ = load_representation(tmp_path / "net.nern", _table("affine"))
    images, expected = torch.rand(5, 1, 8, 8), nernlit.load(tmp_path / "net.nern")
    # The kept tensors that are not trained are the original's, not rounded.
    assert torch.allclose(again(images), expected(images), atol=1e-4 if kept == "fp32" else 0.1)


@pytest.mark.parametrize("folded", [False, True])
def test_trained_tensors_that_the_representation_does_not_train_are_refused(tmp_path: Path, folded: bool) -> None:
    file = tmp_path / "net.nern"
    _fitted(_table("all")).save(file, kept="bf16", fold_batch_norm=folded)
    for which in ("none", "affine"):
        with pytest.raises(CheckpointError, match=r"holds \d+ trained kept tensors \(.*pass the same --model\.repr"):
            load_representation(file, _table(which))
    load_representation(file, _table("all"))
    _table("none").save(file, kept="int8", fold_batch_norm=folded)  # rounding is no training
    load_representation(file, _table("none"))


def test_a_file_with_its_original_has_the_files_kept_tensors(tmp_path: Path) -> None:
    representation = _fitted(_table("affine"))
    representation.save(tmp_path / "net.nern", fold_batch_norm=True)
    save_file(representation.original.net.state_dict(), tmp_path / "original.safetensors")
    again, _ = load_representation(tmp_path / "net.nern", original=tmp_path / "original.safetensors")
    images = torch.rand(5, 1, 8, 8)
    assert torch.allclose(again(images), representation(images), atol=1e-4)
    assert torch.allclose(again.original(images), representation.original(images), atol=1e-6)
    entries = again.original_entries()
    assert entries.keys() == again.entries().keys()
    assert torch.allclose(again.original(images, entries), representation.original(images), atol=1e-6)


@pytest.mark.parametrize("gradients", ["sampled", "all"])
def test_baseline_joint_trains_them_too(gradients: str) -> None:
    representation = _table("affine")
    module = BaselineJoint(representation, _adam, gradients=gradients, sampling=Uniform(16), precision="fp32")  # type: ignore[arg-type]
    images, labels = torch.rand(8, 1, 8, 8), torch.zeros(8).long()
    with torch.no_grad():
        for parameter in representation.predictor.parameters():
            parameter.mul_(1.1)  # a table has no error at first
    quiet_trainer(max_steps=3).fit(module, DataLoader([(images, labels)] * 3, batch_size=None))  # type: ignore[arg-type]
    state = representation.original.net.state_dict()
    assert all(not torch.equal(value, state[key]) for key, value in representation.tuned.named().items())


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
    assert set(representation.lr_multipliers().values()) == {0.1}
    assert set(representation.lr_multipliers()) == set(representation.tuned.parameters())


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


@pytest.mark.parametrize("kept", ["fp32", "int8"])
def test_sizes_are_those_of_the_file_with_the_trained_tensors(tmp_path: Path, kept: str) -> None:
    representation = _table("all")
    with torch.no_grad():
        for value in representation.tuned.parameters():
            value.fill_(0.5)
    representation.save(tmp_path / "net.nern", kept=kept)  # type: ignore[arg-type]
    assert representation.sizes(kept).file_bytes == (tmp_path / "net.nern").stat().st_size  # type: ignore[arg-type]


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator")
def test_files_of_an_accelerators_tensors_are_those_of_the_cpu(tmp_path: Path) -> None:
    representation = _table("affine")
    representation.save(tmp_path / "cpu.nern", "int8", fold_batch_norm=True)
    representation.to(torch.accelerator.current_accelerator()).save(tmp_path / "there.nern", "int8", True)
    assert (tmp_path / "cpu.nern").read_bytes() == (tmp_path / "there.nern").read_bytes()
