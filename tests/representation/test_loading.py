import importlib
import os
import shutil
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

import nernlit
from nernlit.coding import KeptForm, is_nern
from nernlit.errors import CheckpointError, FileFormatError, UsageError
from nernlit.originals import Original
from nernlit.predictors import MLP
from nernlit.representation import Representation, load_representation
from nernlit.storage.container import Contents, read_container, write_container
from nernlit.training import ReconOnly
from tests.fakes import digits_representation, tiny_representation

IMAGES = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def test_a_given_representation_is_filled_from_a_file(tmp_path: Path) -> None:
    stored, given = digits_representation(), digits_representation()
    stored.save(tmp_path / "net.nern")
    with torch.no_grad():
        next(given.predictor.parameters()).zero_()
    filled, rebuilt = load_representation(tmp_path / "net.nern", given)
    assert filled is given
    assert rebuilt == {"init_from": None}  # the given representation says how it is built
    assert torch.equal(given(IMAGES), stored(IMAGES))
    assert torch.equal(given.addresses, stored.addresses)
    assert given.original.weights_from == "timm's pretrained weights"  # and not the reconstructed network


def test_a_file_of_another_representation_or_original_is_refused(tmp_path: Path) -> None:
    digits_representation(9).save(tmp_path / "wide.nern")
    with pytest.raises(CheckpointError, match=r"wide\.nern: .*hidden is 8 here and 9 in the checkpoint"):
        load_representation(tmp_path / "wide.nern", digits_representation())
    tiny_representation(1).save(tmp_path / "other.nern")
    with pytest.raises(CheckpointError, match=r"other\.nern: the checkpoint was fitted to another original"):
        load_representation(tmp_path / "other.nern", tiny_representation(0))


def test_a_representation_out_of_a_file_is_built_again_from_that_file(tmp_path: Path) -> None:
    path = tmp_path / "net.nern"
    digits_representation().save(path)
    loaded, rebuilt = load_representation(path)
    assert rebuilt == {"init_from": str(path)}
    state = {f"representation.{name}": value for name, value in loaded.state_dict().items()}
    torch.save({"state_dict": state, "hyper_parameters": {"representation": None, **rebuilt}}, tmp_path / "fit.ckpt")
    again, rebuilt_again = load_representation(tmp_path / "fit.ckpt")
    assert rebuilt_again == rebuilt
    assert torch.equal(again(IMAGES), loaded(IMAGES))
    shutil.move(path, tmp_path / "moved.nern")
    with pytest.raises(
        CheckpointError,
        match=r"fit\.ckpt was fitted with .*net\.nern, which does not exist any more. Pass its new path",
    ):
        nernlit.load(tmp_path / "fit.ckpt")
    with pytest.raises(
        CheckpointError, match=r"was fitted from .*net\.nern; expected that \.nern file as original, not o"
    ):
        load_representation(tmp_path / "fit.ckpt", original="original.safetensors")
    moved, rebuilt_moved = load_representation(tmp_path / "fit.ckpt", original=tmp_path / "moved.nern")
    assert rebuilt_moved == {"init_from": str(tmp_path / "moved.nern")}
    assert torch.equal(moved(IMAGES), loaded(IMAGES))


def test_weights_out_of_a_file_are_the_same_original_on_every_machine(tmp_path: Path) -> None:
    """The last bits of decoded weights depend on the machine; here the file says that it decoded to other ones."""
    digits_representation().save(tmp_path / "net.nern")
    header, tensors = read_container(tmp_path / "net.nern")
    tensors["checks.reconstructed"] = torch.full((32,), 255, dtype=torch.uint8)
    write_container(tmp_path / "elsewhere.nern", Contents(header, tensors))
    original = Original("digits_resnet8", checkpoint=str(tmp_path / "elsewhere.nern"))
    assert original.fingerprint() == "f" * 64
    assert nernlit.load(tmp_path / "elsewhere.nern").original.fingerprint() == "f" * 64
    with torch.no_grad():
        next(original.net.parameters()).add_(1)
    assert original.fingerprint() != "f" * 64  # no longer what the file decodes to


def test_an_original_takes_a_files_weights_classes_and_pixel_statistics(tmp_path: Path) -> None:
    path = str(tmp_path / "net.nern")
    representation = digits_representation()
    representation.original.class_names = tuple("abcdefghij")
    representation.original.mean.fill_(0.25)
    representation.save(path)
    original = Original("digits_resnet8", checkpoint=path)
    assert original.weights_from == path
    assert original.class_names == tuple("abcdefghij")
    assert original.mean.flatten().tolist() == [0.25]
    for key, value in representation.reconstructed().items():
        assert torch.equal(original.net.state_dict()[key], value), key
    assert Original("digits_resnet8", checkpoint=path, mean=[0.5]).mean.flatten().tolist() == [0.5]
    with pytest.raises(UsageError, match=r"ema: true is given, but .*net\.nern holds one set of weights only"):
        Original("digits_resnet8", checkpoint=path, ema=True)
    with pytest.raises(CheckpointError, match="does not fit CifarResNet"):
        Original("cifar_resnet20", checkpoint=path)
    with pytest.raises(FileFormatError, match="is missing"):
        Original("digits_resnet8", checkpoint=str(tmp_path / "gone.nern"))


@pytest.mark.parametrize("form", ["long", "short"])
def test_a_class_that_a_checkpoint_names_is_not_imported_from_anywhere(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = f"installed_{form}"
    (tmp_path / f"{module}.py").write_text(
        "from pathlib import Path\n\nfrom nernlit import MLP\n\nPath('imported').touch()\n\n\n"
        "class Mine(MLP):\n    def __init__(self, hidden: int = 8) -> None:\n        super().__init__(hidden)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    state = {f"representation.{name}": value for name, value in digits_representation().state_dict().items()}
    described = {
        "original": {"name": "digits_resnet8", "pretrained": True},
        "predictor": f"{module}.Mine" if form == "short" else {"class_path": f"{module}.Mine", "init_args": {}},
    }
    torch.save({"state_dict": state, "hyper_parameters": {"representation": described}}, "fit.ckpt")
    with pytest.raises(CheckpointError, match=rf"fit\.ckpt: .* {module}\.Mine is refused, .* Pass --trust"):
        nernlit.load("fit.ckpt")
    assert not Path("imported").exists()
    importlib.import_module(module)
    with pytest.raises(CheckpointError, match=rf"class_path is '{module}\.Mine' here and 'nernlit\.predictors"):
        nernlit.load("fit.ckpt")  # imported by its user, the class is known: now only its specification differs


def test_options_for_nern_files_are_refused_with_checkpoints() -> None:
    for options in ({"max_gib": 8.0}, {"net": torch.nn.Identity()}):
        with pytest.raises(UsageError, match=r"fit\.ckpt is not a \.nern file"):
            nernlit.load("fit.ckpt", **options)  # type: ignore[arg-type]


def test_what_is_loaded_is_in_evaluation_mode(tmp_path: Path) -> None:
    digits_representation().train().save(tmp_path / "net.nern")
    assert not nernlit.load(tmp_path / "net.nern").training


def test_a_file_is_known_by_its_content_whatever_its_name_is(tmp_path: Path) -> None:
    representation = digits_representation()
    representation.save(tmp_path / "net.nern")
    (tmp_path / "net.nern").rename(tmp_path / "download")
    images = torch.rand(2, 1, 8, 8)
    assert torch.equal(nernlit.load(tmp_path / "download")(images), representation(images))
    original = Original("digits_resnet8", checkpoint=str(tmp_path / "download")).freeze()
    assert torch.allclose(original(images), representation(images), atol=1e-5)
    with pytest.raises(UsageError, match=r"expected a file name that ends in \.nern"):
        representation.save(tmp_path / "download")


@pytest.mark.parametrize("form", ["fp16", "bf16", "int8"])
def test_a_file_of_rounded_tensors_is_loaded_into_a_given_representation(form: KeptForm, tmp_path: Path) -> None:
    for seed in range(4):  # the header has two digits of the rounding error
        representation = digits_representation()
        with torch.no_grad():
            for name, buffer in representation.original.net.named_buffers():
                if name.endswith("running_mean"):
                    buffer.copy_(torch.randn(buffer.shape, generator=torch.Generator().manual_seed(seed)))
        representation.save(tmp_path / "net.nern", form, fold_batch_norm=True)
        load_representation(tmp_path / "net.nern", representation)


def test_a_checkpoint_of_a_predictor_is_no_network(tmp_path: Path) -> None:
    state = {f"representation.{name}": value for name, value in digits_representation().state_dict().items()}
    torch.save({"state_dict": {k: v for k, v in state.items() if isinstance(v, torch.Tensor)}}, tmp_path / "fit.ckpt")
    with pytest.raises(CheckpointError, match="is a checkpoint of a predictor, not of a network"):
        Original("digits_resnet8", checkpoint=str(tmp_path / "fit.ckpt"))


def test_a_pipe_is_not_read_to_find_out_what_it_is(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert not is_nern(tmp_path / "pipe")  # opening it would wait for a writer


def test_recon_only_trains_a_file_of_rounded_tensors_towards_its_original(tmp_path: Path) -> None:
    stored = digits_representation()
    stored.save(tmp_path / "net.nern", "int8", fold_batch_norm=True)
    save_file(stored.original.net.state_dict(), tmp_path / "original.safetensors")
    loaded, _ = load_representation(tmp_path / "net.nern", original=tmp_path / "original.safetensors")
    assert loaded.tuned.keys  # they differ from the original's
    ReconOnly(loaded, optimizer=lambda parameters: torch.optim.Adam(parameters, lr=1e-3))
    assert not any(value.requires_grad for value in loaded.tuned.parameters())


def test_a_file_of_a_network_in_memory_says_how_many_channels_its_images_have(tmp_path: Path) -> None:
    net = timm.create_model("cifar_resnet20", in_chans=1)
    original = Original.from_module(net, num_classes=10, mean=[0.5], std=[0.5])
    Representation(original, MLP(8, num_frequencies=4), order="none").save(tmp_path / "gray.nern")
    loaded = Original("cifar_resnet20", checkpoint=str(tmp_path / "gray.nern"))
    assert loaded.in_chans == 1
    assert loaded.net.conv1.weight.shape == (16, 1, 3, 3)
