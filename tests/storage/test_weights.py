"""Files of weights: what is read, what is refused, and which of several sets is taken."""

import argparse
import io
import json
import logging
import pickle
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save, save_file
from torch import Tensor, nn

from nernlit.errors import CheckpointError, UsageError
from nernlit.originals import Original, read_state_dict
from nernlit.storage.weights import load_strictly

NAME = "digits_resnet8"


def _weights(seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return {key: value.detach() for key, value in timm.create_model(NAME).state_dict().items()}


def _file(content: object, name: str = "w.pt") -> str:
    torch.save(content, name)
    return name


def _loaded(content: object, **options: Any) -> Mapping[str, Tensor]:
    return Original(NAME, checkpoint=_file(content), **options).net.state_dict()


def _is(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> bool:
    return state.keys() == expected.keys() and all(torch.equal(state[key], expected[key]) for key in state)


def _prefixed(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in state.items()}


RAW, AVERAGED = _weights(0), _weights(1)
TWO_SETS: dict[str, dict[str, Any]] = {
    "timm": {"state_dict": RAW, "state_dict_ema": AVERAGED},
    "timm and torchvision": {"model": RAW, "model_ema": AVERAGED},
    "torchvision, averaged in a wrapper": {
        "model": RAW,
        "model_ema": _prefixed(AVERAGED, "module.") | {"n": RAW["linear.bias"]},
    },
    "one module for both": {"state_dict": _prefixed(RAW, "net.") | _prefixed(AVERAGED, "ema.module.")},
    "nested": {"state_dict": RAW, "ema": {"decay": 0.99, "shadow": AVERAGED}},
}


@pytest.mark.parametrize("kind", TWO_SETS)
def test_of_two_sets_the_average_is_taken_and_said_so(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    content = TWO_SETS[kind]
    with caplog.at_level(logging.WARNING, "nernlit"):
        assert _is(_loaded(content), AVERAGED)
    (said,) = [record.getMessage() for record in caplog.records if record.name.startswith("nernlit")]
    assert "w.pt holds 2 sets of weights: took the averaged (EMA) ones in " in said
    assert said.endswith(", as timm does; pass ema: false for the raw ones.")
    assert _is(_loaded(content, ema=False), RAW)
    assert _is(_loaded(content, ema=True), AVERAGED)


@pytest.mark.parametrize(
    "content", [TWO_SETS["timm"], TWO_SETS["timm and torchvision"], {"state_dict": RAW, "model": AVERAGED}]
)
def test_the_set_that_is_taken_is_timms(content: object) -> None:
    net = timm.create_model(NAME, checkpoint_path=_file(content))
    assert _is(_loaded(content), net.state_dict())


def test_only_the_first_process_says_which_set_was_taken(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    _loaded(TWO_SETS["timm"])
    assert not [record for record in caplog.records if record.name.startswith("nernlit")]


def test_ema_is_honored_or_refused() -> None:
    with pytest.raises(
        CheckpointError, match=r"ema: true is given, but w\.pt holds no averaged \(EMA\) weights, only raw"
    ):
        _loaded({"state_dict": RAW}, ema=True)
    with pytest.raises(CheckpointError, match=r"ema: false is given, but w\.pt holds no raw weights, only averaged"):
        _loaded({"state_dict_ema": RAW}, ema=False)
    with pytest.raises(UsageError, match="ema: false chooses among a checkpoint's weights, but no checkpoint is given"):
        Original(NAME, ema=False)
    partly = {key: value for key, value in AVERAGED.items() if "running" not in key}
    with pytest.raises(
        CheckpointError, match=r"averaged \(EMA\) weights in w\.pt \(ema\) do not fit: 14 missing .* ema: false"
    ):
        _loaded({"state_dict": RAW, "ema": partly})
    assert _is(_loaded({"state_dict": RAW, "ema": partly}, ema=False), RAW)
    assert _is(_loaded({"state_dict": RAW, "state_dict_ema": None}), RAW)


def test_several_sets_that_fit_are_refused_unless_they_are_equal() -> None:
    with pytest.raises(
        CheckpointError, match=r"several sets of weights that fit \(state_dict/student\.\*, state_dict/tea"
    ):
        _loaded({"state_dict": _prefixed(RAW, "student.") | _prefixed(AVERAGED, "teacher.")})
    with pytest.raises(CheckpointError, match=r"several sets of weights that fit \(net, best\); save the one"):
        _loaded({"net": RAW, "best": AVERAGED})
    assert _is(_loaded({"net": RAW, "best": {key: value.clone() for key, value in RAW.items()}}), RAW)


WRAPPINGS: dict[str, Any] = {
    "beside a tensor": {"net": RAW, "acc": torch.tensor(0.9)},
    "beside a numpy scalar": {"net": RAW, "acc": np.float64(0.9), "epoch": np.int64(3)},
    "beside numpy's random state": {"model": RAW, "rng": np.random.RandomState(0).get_state()},
    "beside training options": {"state_dict": RAW, "args": argparse.Namespace(lr=0.1)},
    "beside a loss's weight": {"state_dict": _prefixed(RAW, "model.") | {"criterion.weight": torch.ones(10)}},
    "beside another network": {"state_dict": _prefixed(RAW, "student.") | {"teacher.conv1.weight": torch.ones(3)}},
    "beside an optimizer": {"net": RAW, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": []}},
    "in two wrappers": {"model_state_dict": _prefixed(RAW, "_orig_mod.module.")},
    "in a module's attribute": _prefixed(RAW, "backbone.encoder."),
    "in nests": {"trained": {"weights": {"student": RAW}}},
    "as parameters": {key: nn.Parameter(value) if value.is_floating_point() else value for key, value in RAW.items()},
    "without counters": {key: value for key, value in RAW.items() if not key.endswith("num_batches_tracked")},
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_weights_are_found_by_the_network_that_they_fit(wrapping: str) -> None:
    assert _is(_loaded(WRAPPINGS[wrapping]), RAW)


class _Within(nn.Module):
    """A network whose weights all lie under one attribute."""

    def __init__(self, attribute: str) -> None:
        super().__init__()
        self.add_module(attribute, nn.Sequential(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 1)))


@pytest.mark.parametrize("attribute", ["net", "model", "module", "original"])
@pytest.mark.parametrize("wrapper", ["", "module.", "model.", "net."])
def test_a_prefix_that_the_network_has_itself_stays(attribute: str, wrapper: str) -> None:
    net, other = _Within(attribute), _Within(attribute)
    path = _file({"state_dict": _prefixed(net.state_dict(), wrapper)})
    load_strictly(other, read_state_dict(path, other), path)
    assert _is(other.state_dict(), net.state_dict())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_types_keep_their_values(dtype: torch.dtype) -> None:
    typed = {key: value.to(dtype) if value.is_floating_point() else value for key, value in RAW.items()}
    state = _loaded(typed)
    assert state["conv1.weight"].dtype == torch.float32
    assert torch.equal(state["conv1.weight"], typed["conv1.weight"].float())


UNUSABLE: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "integers": (lambda x: (100 * x).to(torch.int8), "int8"),
    "booleans": (lambda x: x > 0, "bool"),
    "complex": (lambda x: x.to(torch.complex64), "complex64"),
    "sparse": (lambda x: x.to_sparse(), "float32 (sparse_coo)"),
    "quantized": (lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8), "qint8"),
    "meta": (lambda x: x.to("meta"), "float32 without values (meta)"),
}


@pytest.mark.parametrize("kind", UNUSABLE)
def test_tensors_that_are_no_floats_are_refused_by_name(kind: str) -> None:
    change, described = UNUSABLE[kind]
    with pytest.raises(CheckpointError) as caught:
        _loaded(RAW | {"conv1.weight": change(RAW["conv1.weight"])})
    assert f"w.pt holds tensors that are no floating-point weights: conv1.weight is {described}." in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300])
def test_weights_that_are_not_finite_are_refused_by_name(value: float) -> None:
    weight = RAW["layer1.0.conv1.weight"].double().clone()
    weight[0, 0, 0, 0] = value
    with pytest.raises(CheckpointError, match=r"1 of 2304 values of layer1\.0\.conv1\.weight in w\.pt are not finite"):
        _loaded(RAW | {"layer1.0.conv1.weight": weight})
    with pytest.raises(CheckpointError, match=r"bn1\.running_var in w\.pt has negative variances \(lowest: -1\)"):
        _loaded(RAW | {"bn1.running_var": -torch.ones(16)})


def _tar() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        archive.addfile(tarfile.TarInfo("weights"))
    return file.getvalue()


def _zip(flipped: bool = False, cut: bool = False) -> bytes:
    file = io.BytesIO()
    torch.save(RAW, file)
    content = bytearray(file.getvalue())
    if flipped:
        content[content.index(RAW["conv1.weight"].numpy().tobytes()) + 40] ^= 1
    return bytes(content[: len(content) // 2] if cut else content)


def _pickled(thing: object) -> bytes:
    file = io.BytesIO()
    torch.save(thing, file)
    return file.getvalue()


NO_WEIGHTS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "an empty file"),
    "html": (b"<!DOCTYPE html><html><head><title>Sign in</title></head></html>", "an HTML page"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "a Git LFS pointer"),
    "tar.gz": (_tar(), "a gzip archive"),
    "keras": (b"\x89HDF\r\n\x1a\n" + bytes(100), "an HDF5 file"),
    "onnx": (b"\x08\x07\x12\x07pytorch\x1a\x052.0.0" + bytes(100), "an ONNX model"),
    "gguf": (b"GGUF\x03\x00\x00\x00" + bytes(100), "a GGUF model"),
    "tflite": (b"\x1c\x00\x00\x00TFL3" + bytes(100), "a TensorFlow Lite model"),
    "index": (
        json.dumps({"metadata": {}, "weight_map": {"conv1.weight": "a-00001.safetensors"}}).encode(),
        "the index of weights that are split over several safetensors files",
    ),
    "pickle": (pickle.dumps({"a": 1}), "a Python pickle"),
    "module": (_pickled(nn.Conv2d(1, 1, 1)), r"a PyTorch file of pickled objects \(torch.nn.modules.conv.Conv2d"),
    "truncated": (_zip(cut=True), "a damaged or truncated zip file"),
    "flipped": (_zip(flipped=True), r"a damaged or truncated zip file .* the checksum of its entry"),
    "truncated safetensors": (save(RAW)[:-10], "a damaged or truncated safetensors file"),
    "huge header": ((2**62).to_bytes(8, "little") + b'{"a":1}', "a file of an unknown kind"),
    "huge tensor": (
        (lambda header: len(header).to_bytes(8, "little") + header)(
            b'{"a":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,4398046511104]}}'
        ),
        "a damaged or truncated safetensors file",
    ),
    "unknown": (bytes(range(1, 200)), "a file of an unknown kind"),
}


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("kind", NO_WEIGHTS)
def test_the_message_says_what_the_file_is_and_what_to_pass(kind: str, suffix: str) -> None:
    content, described = NO_WEIGHTS[kind]
    Path(f"file{suffix}").write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"cannot read weights from file{suffix}: it is {described}") as caught:
        Original(NAME, checkpoint=f"file{suffix}")
    assert "save the network's state_dict()" in str(caught.value)
    assert "weights_only" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_is_named_as_one_and_no_file_as_none() -> None:
    for name in ("", "nowhere.pt", "x" * 5000, "a\0b"):
        with pytest.raises(CheckpointError, match=r"no file at|is a folder"):
            Original(NAME, checkpoint=name)
    Path("folder").mkdir()
    with pytest.raises(CheckpointError, match="cannot read weights from folder: it is a folder"):
        Original(NAME, checkpoint="folder")


def test_the_content_decides_how_a_file_is_read_and_not_its_name() -> None:
    save_file(RAW, "pytorch_model.bin")
    _file(RAW, "model.safetensors")
    for name in ("pytorch_model.bin", "model.safetensors"):
        assert _is(Original(NAME, checkpoint=name).net.state_dict(), RAW)
    torch.save(RAW, "old.pt", _use_new_zipfile_serialization=False)
    assert _is(Original(NAME, checkpoint="old.pt").net.state_dict(), RAW)


@pytest.mark.parametrize("content", [torch.ones(3), [torch.ones(3)], {}, {"epoch": 3}, {1: torch.ones(2)}, None])
def test_content_without_named_tensors_is_refused(content: object) -> None:
    with pytest.raises(CheckpointError, match=r"w\.pt holds no named tensors; expected a state dict, bare or under"):
        _loaded(content)


def test_weights_of_another_network_are_told_by_their_names() -> None:
    with pytest.raises(
        CheckpointError, match=r"w\.pt does not fit CifarResNet: 37 missing .*; 1 unexpected \(stem\.w\)"
    ):
        _loaded({"stem.w": torch.ones(2)})
    smaller = {key: value for key, value in RAW.items() if not key.startswith("layer3.")}
    with pytest.raises(
        CheckpointError, match=r"\d+ missing \(layer3\.0\.conv1\.weight, .*\)\. Check the original's name"
    ):
        _loaded({"state_dict": _prefixed(smaller, "model."), "ema_loss": torch.ones(1)})
