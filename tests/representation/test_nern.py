import hashlib
import json
import lzma
import math
import random
import time
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import nernlit
from nernlit.coding import KeptForm, part_bytes
from nernlit.errors import FileFormatError, UsageError
from nernlit.kernels import LayerFilter, coded_bits
from nernlit.originals import Original
from nernlit.predictors import MLP, Predictor, Table
from nernlit.representation import Representation
from nernlit.storage.container import Contents, read_container, write_container
from tests.fakes import STATISTICS, TinyCNN, digits_representation, tiny_representation

IMAGES = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "net.nern"
    digits_representation().save(path)
    return path


@pytest.mark.parametrize("order", ["none", "in_filter", "cross_filter"])
def test_a_file_decodes_to_the_same_network_without_the_original(tmp_path: Path, order: str) -> None:
    torch.manual_seed(0)
    original = Original("digits_resnet8", pretrained=True)
    representation = Representation(original, MLP(8, num_frequencies=4), LayerFilter(exclude=["conv1"]), order)  # type: ignore[arg-type]
    representation.save(tmp_path / "net.nern")
    loaded = nernlit.load(tmp_path / "net.nern")
    expected = representation.reconstructed()
    assert loaded.reconstructed().keys() == expected.keys()
    for key, value in loaded.reconstructed().items():
        assert torch.equal(value, expected[key]), key
        assert torch.equal(loaded.original.net.state_dict()[key], value)
    assert torch.equal(loaded(IMAGES), representation(IMAGES))
    assert torch.equal(loaded.addresses, representation.addresses)
    assert loaded.specification() == representation.specification()
    assert loaded.original.weights_from == str(tmp_path / "net.nern")


@pytest.mark.parametrize("kept", ["fp32", "int8"])
@pytest.mark.parametrize("fold", [False, True])
def test_what_a_file_would_hold_is_known_without_writing_it(kept: KeptForm, fold: bool, tmp_path: Path) -> None:
    representation = digits_representation()
    representation.save(tmp_path / "net.nern", kept, fold)
    stored = representation.original(IMAGES, representation.stored_entries(None, kept, fold))
    assert torch.allclose(stored, nernlit.load(tmp_path / "net.nern")(IMAGES), atol=1e-5)
    assert bool((stored - representation(IMAGES)).abs().max() > 1e-3) == (kept == "int8")


def test_a_file_is_as_large_as_what_has_to_be_stored(file: Path) -> None:
    representation = digits_representation()
    sizes = representation.sizes()
    parts = part_bytes(read_container(file))
    assert parts["predictor"] == 4 * sizes.predictor_params
    assert 0 <= parts["order"] - coded_bits(representation.layout, "in_filter") / 8 <= 8
    state = representation.original.net.state_dict()
    numbers = sum(value.nbytes for key, value in state.items() if not key.endswith("num_batches_tracked"))
    assert parts["kept"] == numbers - 4 * sizes.predicted_weights  # counters, of equal numbers, are in the header
    assert parts["scale"] == 4


def test_what_a_file_decodes_to_is_the_target_of_further_training(file: Path) -> None:
    loaded = nernlit.load(file)
    rows = torch.arange(10)
    assert torch.allclose(loaded.kernels(rows), loaded.target[rows], atol=1e-7)
    loss = (loaded.kernels(rows) - 1).square().mean()
    loss.backward()
    assert all(p.grad is not None for p in loaded.predictor.parameters())


def test_a_file_of_a_file_is_the_same_network(file: Path, tmp_path: Path) -> None:
    loaded = nernlit.load(file)
    loaded.save(tmp_path / "again.nern")
    again = nernlit.load(tmp_path / "again.nern")
    assert torch.equal(again(IMAGES), loaded(IMAGES))


def test_the_same_representation_gives_the_same_bytes(file: Path, tmp_path: Path) -> None:
    digits_representation().save(tmp_path / "again.nern")
    assert (tmp_path / "again.nern").read_bytes() == file.read_bytes()


def test_the_network_can_be_taken_out_as_a_module_in_evaluation_mode(file: Path) -> None:
    loaded = nernlit.load(file)
    module = loaded.module()
    assert not module.training
    original = loaded.original
    assert torch.equal(module((IMAGES - original.mean) / original.std), loaded(IMAGES))
    assert type(module) is type(timm.create_model("digits_resnet8"))
    with torch.no_grad():
        next(module.parameters()).zero_()
    assert next(original.net.parameters()).abs().sum() > 0  # it is a copy


def test_a_network_of_ones_own_is_passed_to_load(tmp_path: Path) -> None:
    representation = tiny_representation()
    representation.save(tmp_path / "tiny.nern")
    with pytest.raises(FileFormatError, match="TinyCNN that timm cannot make; pass a network of this architecture"):
        nernlit.load(tmp_path / "tiny.nern")
    loaded = nernlit.load(tmp_path / "tiny.nern", net=TinyCNN())
    assert torch.equal(loaded(IMAGES), representation(IMAGES))
    with pytest.raises(FileFormatError, match="does not fit"):
        nernlit.load(tmp_path / "tiny.nern", net=nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(72, 10)))


class Shared(nn.Module):
    """A convolution that is used twice, and a classifier under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(1, 1, 3, padding=1)
        self.again = self.a
        self.fc = nn.Linear(1, 10)
        self.same = self.fc

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.fc(self.again(self.a(x)).mean((2, 3)))
        return out


def test_weights_under_several_names_are_stored_once(tmp_path: Path) -> None:
    torch.manual_seed(0)
    representation = Representation(Original.from_module(Shared(), 10, **STATISTICS), MLP(8, num_frequencies=4))
    representation.save(tmp_path / "shared.nern")
    contents = read_container(tmp_path / "shared.nern")
    assert sorted(name for name in contents.tensors if name.startswith("kept.")) == [
        "kept.a.bias",
        "kept.fc.bias",
        "kept.fc.weight",
    ]
    loaded = nernlit.load(tmp_path / "shared.nern", net=Shared())
    assert torch.equal(loaded(IMAGES), representation(IMAGES))


class Constant(Predictor):
    def __init__(self, kernel_size: int = 3) -> None:
        super().__init__(kernel_size)
        self.kernel = nn.Parameter(torch.ones(kernel_size, kernel_size))

    def bind(self, layers: Sequence[tuple[int, int]]) -> None:
        self.layers = layers

    def forward(self, addresses_N3: torch.Tensor) -> torch.Tensor:
        return self.kernel.expand(len(addresses_N3), -1, -1)


class Dropped(Constant):
    """Its predictions are others in training mode."""

    def forward(self, addresses_N3: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(super().forward(addresses_N3), 0.5, self.training)


def test_a_predictor_of_ones_own_is_never_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "own.nern"
    with monkeypatch.context() as patch:
        patch.setattr(Constant, "__module__", "elsewhere")
        Representation(Original("digits_resnet8", pretrained=True), Constant()).save(path)
        assert isinstance(nernlit.load(path).predictor, Constant)
    with pytest.raises(
        FileFormatError, match=r"the file's predictor is a elsewhere\.Constant, which is not imported; imp"
    ):
        nernlit.load(path)


def test_a_predictor_of_a_script_is_found_in_the_module_that_it_is_in_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Constant, "__module__", "__main__")
        Representation(Original("digits_resnet8", pretrained=True), Constant()).save(tmp_path / "own.nern")
    assert isinstance(nernlit.load(tmp_path / "own.nern").predictor, Constant)


def test_a_file_is_checked_with_its_predictor_in_evaluation_mode(tmp_path: Path) -> None:
    representation = Representation(Original("digits_resnet8", pretrained=True), Dropped()).eval()
    representation.save(tmp_path / "own.nern")
    loaded = nernlit.load(tmp_path / "own.nern")
    assert torch.equal(loaded.kernels(), representation.kernels())


def test_files_and_networks_do_not_depend_on_the_callers_modes(tmp_path: Path) -> None:
    representation = digits_representation(16)
    weights = representation.reconstructed()
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        representation.save(tmp_path / "net.nern")
        assert all(torch.equal(value, weights[key]) for key, value in representation.reconstructed().items())
        loaded = nernlit.load(tmp_path / "net.nern")
    for default in (torch.float64, torch.float16):
        torch.set_default_dtype(default)
        try:
            again = nernlit.load(tmp_path / "net.nern")
        finally:
            torch.set_default_dtype(torch.float32)
        for key, value in again.reconstructed().items():
            assert torch.allclose(value, weights[key], atol=1e-6), key
    loaded(torch.rand(2, 1, 8, 8)).sum().backward()  # it can be trained
    assert all(parameter.grad is not None for parameter in loaded.predictor.parameters())


@pytest.mark.parametrize("form", ["fp32", "bf16", "int8"])
def test_odd_buffers_are_stored_as_they_are(form: KeptForm, tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 4, 3)
            self.register_buffer("one_of_many", torch.arange(12.0).view(4, 3)[1:2, 0])
            self.register_buffer("attn_mask", torch.tensor([-torch.inf, 0.0, 1.0]))
            self.register_buffer("conjugate", torch.tensor([1 + 2j, 3 - 1j]).conj())

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            maps: torch.Tensor = self.conv(images)
            return maps.flatten(1)

    net = Net()
    Representation(Original.from_module(net), MLP(8)).save(tmp_path / "net.nern", form)
    state = nernlit.load(tmp_path / "net.nern", Net()).reconstructed()
    for name in ("one_of_many", "attn_mask", "conjugate"):
        assert torch.allclose(state[name], net.state_dict()[name], rtol=4e-3), name  # int8 rounds


def test_a_file_as_checkpoint_has_the_arguments_of_its_network(tmp_path: Path) -> None:
    arguments = {"img_size": 16, "patch_size": 4, "depth": 1}
    original = Original("test_vit", num_classes=4, in_chans=1, mean=[0.5], std=[0.5], arguments=arguments)
    original.weights_from = "memory"
    Representation(original, Table(4), layers="all").save(tmp_path / "net.nern")
    again = Original("test_vit", checkpoint=str(tmp_path / "net.nern"))
    assert again.architecture == original.architecture


def test_a_table_of_other_layers_is_refused_before_it_is_built(tmp_path: Path) -> None:
    path = tmp_path / "table.nern"
    Representation(digits_representation().original, Table(), order="none").save(path)
    header, tensors = read_container(path)
    first = next(iter(header["specification"]["layers"]))
    header["specification"]["layers"][first] = [4096, 4096, 3, 3]
    write_container(path, Contents(header, tensors))
    with pytest.raises(FileFormatError, match="do not match its description in the header"):
        nernlit.load(path)


def test_the_file_is_readable_without_this_package(file: Path) -> None:
    content = file.read_bytes()
    assert content[:6] == b"\x89NERN\x04"
    assert content[6:14] == hashlib.sha256(content[14:]).digest()[:8]
    end = 18 + int.from_bytes(content[14:18], "little")
    options = {"id": lzma.FILTER_LZMA1, "dict_size": 2**20, "lc": 4, "lp": 0, "pb": 0}
    header = json.loads(lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=[options]).decompress(content[18:end]))
    assert header["network"] == {"name": "digits_resnet8", "num_classes": 10}
    sizes = {"float32": 4, "int64": 8, "uint8": 1}
    assert end + sum(sizes[kind] * math.prod(shape) for kind, shape in header["tensors"].values()) == len(content)
    assert header["tensors"]["scale"] == ["float32", []]
    assert np.frombuffer(content[end : end + 4], "<f4")[0] == digits_representation().scale


def test_weights_and_missing_files_are_refused(tmp_path: Path, file: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "weights.nern")
    with pytest.raises(FileFormatError, match=r"is a safetensors file \(tensors: 1\); expected a .nern file"):
        nernlit.load(tmp_path / "weights.nern")
    with pytest.raises(FileFormatError, match="is missing"):
        nernlit.load(tmp_path / "none.nern")
    with pytest.raises(UsageError, match=r"expected a file name that ends in \.nern"):
        digits_representation().save(tmp_path / "net.safetensors")


def _changed(file: Path, path: Path, **changes: Any) -> Path:
    """The file with another header or other tensors, and a right checksum: what only a forger would write."""
    header, tensors = read_container(file)
    for name, change in changes.items():
        if name in tensors:
            tensors[name] = change
        else:
            header[name] = change
    write_container(path, Contents(header, tensors))
    return path


def test_a_predictor_that_would_need_too_much_memory_is_refused(tmp_path: Path, file: Path) -> None:
    header, tensors = read_container(file)
    side = 300
    header["specification"]["predictor"]["init_args"]["kernel_size"] = side
    tensors["predictor.rest.7.weight"] = torch.zeros(side**2, 8)
    tensors["predictor.rest.7.bias"] = torch.zeros(side**2)
    write_container(tmp_path / "large.nern", Contents(header, tensors))
    with pytest.raises(FileFormatError, match="GiB; pass max_gib"):
        nernlit.load(tmp_path / "large.nern", max_gib=1)


def test_another_version_is_refused(tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nernlit.storage.container.VERSION", 5)
    with pytest.raises(FileFormatError, match="has format version 4, and this nernlit reads version 5"):
        nernlit.load(file)


def test_the_version_before_is_refused_by_name(tmp_path: Path) -> None:
    save_file({"scale": torch.ones(())}, tmp_path / "old.nern", {"format": "nern", "version": "2"})
    message = (
        r"a \.nern file of format version 2, which only an older nernlit reads; expected a \.nern file of version 4"
    )
    with pytest.raises(FileFormatError, match=message):
        nernlit.load(tmp_path / "old.nern")


def _forged(path: Path, text: bytes, length: int | None = None, rest: bytes = b"", times: int = 1) -> Path:
    """A container with any header, of a text repeated so many times, and a right checksum."""
    filters = [{"id": lzma.FILTER_LZMA1, "lc": 4, "lp": 0, "pb": 0}]
    compressor = lzma.LZMACompressor(lzma.FORMAT_RAW, filters=filters)
    header = b"".join(compressor.compress(text) for _ in range(times)) + compressor.flush()
    stored = (len(header) if length is None else length).to_bytes(4, "little") + header + rest
    path.write_bytes(b"\x89NERN\x04" + hashlib.sha256(stored).digest()[:8] + stored)
    return path


#: What is wrong -> a text, its number of repeats, and the stated length of the compressed header (None: the true one).
FORGED: dict[str, tuple[bytes, int, int | None]] = {
    "empty": (b"", 1, None),
    "nothing in it": (b"{}", 1, None),
    "a list": (b"[]", 1, None),
    "cut": (b"{", 1, None),
    "nested": (b"[" * 10**6, 1, None),
    "140 kB that would be 1 GB": (b" " * 10**6, 1000, None),
    "too long": (b'{"tensors": {}}', 1, 2**32 - 1),
    "too short": (b'{"tensors": {}}', 1, 3),
    "a huge tensor": (b'{"tensors": {"scale": ["float32", [1000000000000]]}}', 1, None),
    "negative sides": (b'{"tensors": {"scale": ["float32", [-1, -4]]}}', 1, None),
    "a side with a point": (b'{"tensors": {"scale": ["float32", [1e300]]}}', 1, None),
    "objects": (b'{"tensors": {"scale": ["object", []]}}', 1, None),
    "no shape": (b'{"tensors": {"scale": ["float32"]}}', 1, None),
    "a list of tensors": (b'{"tensors": []}', 1, None),
}


@pytest.mark.parametrize(("text", "times", "length"), FORGED.values(), ids=FORGED)
def test_forged_headers_are_refused_in_little_time_and_memory(
    tmp_path: Path, text: bytes, times: int, length: int | None
) -> None:
    path = _forged(tmp_path / "forged.nern", text, length, times=times)
    tracemalloc.start()
    began = time.monotonic()
    try:
        with pytest.raises(FileFormatError, match=r"forged\.nern"):
            nernlit.load(path)
        assert time.monotonic() - began < 30
        assert tracemalloc.get_traced_memory()[1] < 2**28
    finally:
        tracemalloc.stop()


def test_more_bytes_than_tensors_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match="its header is wrong"):
        nernlit.load(_forged(tmp_path / "long.nern", b'{"tensors": {}}', rest=b"x"))


def test_a_description_that_could_not_be_read_again_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"the description of the network has 20,000,0.. bytes; expected 16,777,216"):
        write_container(tmp_path / "net.nern", Contents({"class_names": "x" * 20_000_000}, {}))
    with pytest.raises(UsageError, match=r"a is uint16; a \.nern file stores bool, uint8"):
        write_container(tmp_path / "net.nern", Contents({}, {"a": torch.zeros(1, dtype=torch.uint16)}))
    assert not list(tmp_path.iterdir())


def _mutated(content: bytes, chance: random.Random) -> bytes:
    changed = bytearray(content)
    kind = chance.randrange(4)
    header = 18 + int.from_bytes(content[14:18], "little")
    if kind == 0:
        return bytes(changed[: chance.randrange(len(changed))])
    if kind == 1:
        changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
    if kind == 2:  # in the header, where names, shapes and offsets are
        for _ in range(chance.randrange(1, 4)):
            changed[chance.randrange(header)] = chance.randrange(256)
    if kind == 3:
        at, size = chance.randrange(len(changed)), chance.randrange(1, 100)
        changed[at : at + size] = chance.randbytes(chance.randrange(100))
    return bytes(changed)


def _try_mutations(file: Path, count: int) -> None:
    content, path = file.read_bytes(), file.with_name("mutated.nern")
    for seed in range(count):
        mutated = _mutated(content, random.Random(seed))
        if mutated == content:
            continue
        path.write_bytes(mutated)
        with pytest.raises(FileFormatError):
            nernlit.load(path)


def test_damaged_files_are_refused(file: Path) -> None:
    _try_mutations(file, 300)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_ten_thousand_damaged_files_are_refused(file: Path) -> None:
    _try_mutations(file, 10_000)


def test_the_reconstructed_weights_load_into_timm(file: Path, tmp_path: Path) -> None:
    loaded = nernlit.load(file)
    save_file(loaded.reconstructed(), tmp_path / "net.safetensors")
    net = timm.create_model("digits_resnet8", checkpoint_path=str(tmp_path / "net.safetensors"))
    for key, value in net.state_dict().items():
        assert torch.equal(value, load_file(tmp_path / "net.safetensors")[key])
