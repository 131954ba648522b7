"""The tensors that are not predicted: exact by default, smaller where asked for, and checked when they are read."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import nernlit
from nernlit.coding import KeptForm, part_bytes
from nernlit.coding.kept import Kept
from nernlit.errors import FileFormatError, UsageError
from nernlit.storage.container import Contents, read_container, write_container
from tests.fakes import digits_representation, tiny_representation

IMAGES = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def _tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "a.weight": torch.randn(40, 3, generator=generator),
        "a.bias": torch.randn(40, generator=generator),
        "b.bias": 100 * torch.randn(30, generator=generator),
        "b.index": torch.arange(2000).reshape(20, 100) % 50,
        "b.mask": torch.rand(100, generator=generator) > 0.9,
        "b.steps": torch.tensor(12345),
        "b.ones": torch.ones(1000),
        "b.minus_zero": -torch.zeros(2),
        "b.scalar": torch.tensor(0.1),
        "b.empty": torch.zeros(0, 3),
        "b.half": torch.randn(8, generator=generator).half(),
        "b.double": torch.randn(8, generator=generator, dtype=torch.float64),
        "b.complex": torch.ones(2, dtype=torch.complex64),
    }


def test_tensors_of_every_type_come_back_to_the_bit() -> None:
    kept = Kept.from_tensors(_tensors())
    read = Kept.read(kept.described, kept.stored)
    assert kept.described["error"] == 0
    for decoded in (kept.values, read.values):
        assert decoded.keys() == _tensors().keys()
        for key, value in _tensors().items():
            assert decoded[key].dtype == value.dtype
            assert decoded[key].shape == value.shape
            assert torch.equal(decoded[key], value)
    assert read.values["b.minus_zero"].signbit().all()


def test_equal_numbers_take_no_bytes_and_integers_few() -> None:
    stored = Kept.from_tensors(_tensors()).stored
    assert "kept.b.ones" not in stored
    assert "kept.b.steps" not in stored
    assert stored["kept.integers"].nbytes < 0.75 * 2000 + 60  # 5.7 bits of each index, and the mask
    assert stored["kept.a.weight"].nbytes == 4 * 120


@pytest.mark.parametrize(("form", "error"), [("fp16", 2**-11), ("bf16", 2**-8), ("int8", 1 / 127)])
def test_rounded_numbers_are_close(form: KeptForm, error: float) -> None:
    kept = Kept.from_tensors(_tensors(), form)
    read = Kept.read(kept.described, kept.stored)
    changes = []
    for key, value in _tensors().items():
        if key.startswith("b.") and not value.is_floating_point():
            assert torch.equal(read.values[key], value)
            continue
        assert torch.equal(read.values[key].float(), kept.values[key].float())
        if value.numel():
            changes.append(float((read.values[key] - value).abs().max() / value.abs().max()))
    assert 0 < max(changes) <= error
    assert kept.described["error"] == pytest.approx(max(changes), rel=0.05)


def test_eight_bits_take_a_step_for_each_vector_and_each_row() -> None:
    kept = Kept.from_tensors({"weight": torch.tensor([[127.0, 1, 20], [0.127, 0.05, 0], [0, 0, 0]])}, "int8")
    assert torch.allclose(kept.values["weight"], torch.tensor([[127, 1, 20], [0.127, 0.05, 0], [0, 0, 0]]), rtol=0.005)
    assert kept.stored["kept.steps"].shape == (3,)
    assert torch.equal(kept.values["weight"][2], torch.zeros(3))


def test_eight_bits_keep_ordinary_numbers_beside_one_far_beyond_them() -> None:
    weight_C = torch.tensor([316.0, *torch.linspace(0.5, 1.5, 15)])
    kept = Kept.from_tensors({"weight": weight_C}, "int8").values["weight"]
    assert float((kept / weight_C - 1).abs().max()) < 0.02
    huge = Kept.from_tensors({"weight": torch.tensor([1e30, 1.0, 2.0])}, "int8").values["weight"]
    assert float(huge[0]) == pytest.approx(1e30, rel=0.01)


def test_eight_bits_keep_the_ratios_of_variances() -> None:
    variance_C = torch.logspace(-6, 3, 10)
    kept = Kept.from_tensors({"norm.running_var": variance_C}, "int8")
    assert float((kept.values["norm.running_var"] / variance_C - 1).abs().max()) < 0.004
    assert kept.values["norm.running_var"].dtype == torch.float32
    read = Kept.read(kept.described, kept.stored)
    assert torch.equal(read.values["norm.running_var"], kept.values["norm.running_var"])


def test_infinite_masks_are_kept() -> None:
    mask = torch.full((3, 3), -math.inf).triu(1)
    for form in ("fp32", "fp16", "bf16"):
        kept = Kept.from_tensors({"mask": mask}, form)
        assert torch.equal(kept.values["mask"], mask)
        assert kept.described["error"] == 0


def test_numbers_that_are_too_large_are_refused_by_name() -> None:
    with pytest.raises(UsageError, match=r"kept='fp16' cannot store 'norm.running_var', whose numbers are too large"):
        Kept.from_tensors({"norm.running_var": torch.tensor([1.0, 1e6])}, "fp16")
    with pytest.raises(UsageError, match="kept='int4'; expected one of fp32, fp16, bf16, int8"):
        Kept.from_tensors({}, "int4")  # type: ignore[arg-type]


@pytest.mark.parametrize("form", ["fp32", "fp16", "bf16", "int8"])
@pytest.mark.parametrize("fold", [False, True])
def test_a_file_is_the_network_with_the_rounded_tensors(tmp_path: Path, form: KeptForm, fold: bool) -> None:
    representation = digits_representation()
    path = tmp_path / "net.nern"
    representation.save(path, form, fold)
    loaded = nernlit.load(path)
    assert representation.sizes(form, fold).file_bytes == path.stat().st_size
    assert torch.equal(loaded.layout.vector(loaded.weights()), representation.layout.vector(representation.weights()))
    logits, expected = loaded(IMAGES), representation(IMAGES)
    assert (logits - expected).abs().max() < {"fp32": 1e-5, "fp16": 1e-2, "bf16": 0.1, "int8": 0.3}[form]
    assert torch.equal(logits, expected) == (form == "fp32" and not fold)
    loaded.save(tmp_path / "again.nern")
    again = nernlit.load(tmp_path / "again.nern")
    assert torch.equal(again(IMAGES), logits)
    assert again.original.fingerprint() == loaded.original.fingerprint()


def test_files_shrink_in_the_order_of_their_forms(tmp_path: Path) -> None:
    representation = tiny_representation()
    sizes = []
    for form in ("fp32", "fp16", "int8"):
        representation.save(tmp_path / "net.nern", form, fold_batch_norm=True)  # type: ignore[arg-type]
        sizes.append(part_bytes(read_container(tmp_path / "net.nern"))["kept"])
    numbers = 6 + 8 + 4 + 4 * 10 + 10  # biases and the head; an untrained BatchNorm has constants only
    assert sizes[:2] == [4 * numbers, 2 * numbers]
    assert sizes[2] < 1.6 * numbers


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"constants": {"a": ["int64", [10**6, 10**6], 0]}}, "does not fit"),
        ({"constants": {"a": ["int64", [-1], 0]}}, "cannot be built"),
        ({"constants": {"a": ["complex64", [1], 0]}}, "cannot be built"),
        ({"coded": {"a": ["int64", [10**12]]}}, "GiB; pass max_gib"),
        ({"coded": {"a": ["int64", [-1]]}}, "does not consist of integers"),
        ({"coded": {"a": ["rounded", [4]]}}, "cannot be built"),
        ({"coded": []}, "cannot be built"),
        ({"form": None}, "cannot be built"),
    ],
)
def test_forged_descriptions_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = tmp_path / "net.nern"
    digits_representation().save(path)
    header, tensors = read_container(path)
    header["kept"] = {**header["kept"], **changes}
    if changes.get("form", "") is None:
        del header["kept"]["form"]
    write_container(path, Contents(header, tensors))
    with pytest.raises(FileFormatError, match=message):
        nernlit.load(path)


def test_damaged_integers_are_refused_with_the_name_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "net.nern"
    digits_representation().save(path, "int8")
    header, tensors = read_container(path)
    tensors["kept.integers"] = tensors["kept.integers"][:-8]
    tensors["kept.integers"][8:].fill_(255)
    write_container(path, Contents(header, tensors))
    with pytest.raises(FileFormatError, match=r"net\.nern"):
        nernlit.load(path)
