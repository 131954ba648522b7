"""A table of invalid inputs: the files of each, the command that reads them, and the message that it must give."""

import os
import pickle
import shutil
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from nernlit.storage.container import VERSION
from tests.hostile_files import (
    RESULT,
    SWEEP_HEAD,
    Code,
    Writer,
    aliases,
    array,
    bomb,
    changed_bytes,
    chunk,
    compared,
    forged,
    png,
    refitted,
    replaced,
    reweighted,
    saved_in_itself,
    swept,
    tested,
    two_networks,
    with_header,
)
from tests.storage.test_file_kinds import KINDS


class BadInput(NamedTuple):
    """A row. The command runs in a folder with what `write_good_files` writes."""

    command: str
    files: Mapping[str, Writer]
    message: str  # a part of the line on stderr


RECONSTRUCT = "reconstruct bad.nern -o out.safetensors"
INSPECT = "inspect bad.nern"
EXPORT = "export bad.ckpt -o out.nern"
COMPRESS = "compress bad.pt --network digits_resnet8 -o out.nern --data DigitsDataModule"
ROUNDS = "analyze rounds run --out out"
INTERPOLATE = "analyze interpolate run --out out --images 10 --points 2"
FIT = "fit -c bad.yaml"
TEST = "test good.nern --data FolderDataModule --data.root images --data.image_size 8"
CIFAR_C = f"{TEST} --data.eval_sets+=CIFAR10C --data.eval_sets.root=c --data.eval_sets.corruptions=[fog]"
SWEEP = "sweep --configs digits_h96 --out ."
COMPARE = "compare digits_resnet8 --data DigitsDataModule --out . --methods fp16"
_BIAS = "state_dict__representation.predictor.first.bias"
_EXTRA = "state_dict__representation._extra_state"
_DESCRIBED = "hyper_parameters__representation"
_ORIGINAL, _PREDICTOR = f"{_DESCRIBED}__original", f"{_DESCRIBED}__predictor"
_POPEN = {"class_path": "subprocess.Popen", "init_args": {"args": ["touch", "ran"]}}
_MLP = "nernlit.predictors.mlp.MLP"
_CONV = torch.ones(16, 1, 3, 3)
_REFUSED = "is refused, since importing it would run its code"
_EVERY_CLASS = [f"images/test/{label}" for label in range(10)]
_YAML_CODE = "base: digits_h96\n"

#: Another header or other tensors of a .nern file -> message.
#: What is wrong with the checkpoint of a trained network -> how it describes the network, and the message.
_TRAINED: dict[str, tuple[Any, str]] = {
    "a network of a hub": ({"name": "hf-hub:somebody/something"}, "timm has no model named 'hf-hub:somebody/"),
    "a network in a folder": ({"name": "local-dir:/etc"}, "timm has no model named 'local-dir:/etc'"),
    "a network that is a number": ({"name": 5}, "timm has no model named '5'"),
    "a process as an argument": (
        {"name": "digits_resnet8", "arguments": {"widths": _POPEN}},
        "expected a number, text or a list of them",
    ),
    "options in a text": ("name", "does not contain the name of its network"),
    "no name": ({"num_classes": 10}, "does not contain the name of its network"),
}
_FORGED: dict[str, tuple[Mapping[str, Any], str]] = {
    "a predictor that is a function": ({"predictor": {"class_path": "os.system", "init_args": {}}}, "is a os.system"),
    "a predictor inside": (
        {"predictor": {"class_path": "nernlit.predictors.ensemble.MeanEnsemble", "init_args": {"members": [_POPEN]}}},
        "which is not imported; import its module (on the command line: --import MODULE)",
    ),
    "a predictor that is a text": ({"predictor": "os.system"}, "cannot be built: string indices"),
    "no arguments": ({"predictor": {"class_path": _MLP, "init_args": {}}}, "missing 1 required positional argument"),
    "a negative width": (
        {"predictor": {"class_path": _MLP, "init_args": {"hidden": -8}}},
        "hidden=-8, depth=5; expected a width",
    ),
    "a network of a hub": ({"network": {"name": "hf-hub:somebody/something"}}, "does not know: hf-hub"),
    "a network in a folder": ({"network": {"name": "local-dir:/etc"}}, "does not know: local-dir"),
    "no network": ({"network": None}, "pass a network of this architecture"),
    "a network that is a list": ({"network": []}, "by unknown options"),
    "a network with an option": ({"network": {"name": "digits_resnet8", "pretrained": True}}, "by unknown options"),
    "billions of classes": (
        {"network": {"name": "digits_resnet8", "num_classes": 10**9}},
        "linear.weight (10, 64) instead of (1000000000, 64)",
    ),
    "billions of channels": (
        {"network": {"name": "digits_resnet8", "arguments": {"widths": [10**9] * 3}}},
        "expected at most 16384",
    ),
    "a path to load": (
        {"network": {"name": "digits_resnet8", "arguments": {"checkpoint_path": "x.pt"}}},
        "has 'checkpoint_path'",
    ),
    "a large network": (
        {"network": {"name": "vit_giant_patch14_224", "num_classes": 10}},
        "bad.nern does not fit vit_giant_patch14_224",
    ),
    "arguments in a list": (
        {"network": {"name": "digits_resnet8", "arguments": [1]}},
        "expected a mapping from argument names to values",
    ),
    "no specification": ({"specification": None}, "cannot be built"),
    "an empty specification": ({"specification": {}}, "cannot be built"),
    "a mean that is a text": ({"mean": "x"}, "expected a list of numbers"),
    "a mean without numbers": ({"mean": []}, "cannot be built"),
    "a standard deviation of 0": ({"std": [0.0]}, "cannot be built"),
    "class names that are a number": ({"class_names": 3}, "class_names is '3'; expected a list of texts"),
    "class names that are numbers": ({"class_names": [1]}, "class_names is '[1]'; expected a list of texts"),
    "a text as number of classes": ({"num_classes": "ten"}, "num_classes is 'ten'; expected an integer"),
    "an original of 0 bytes": ({"original_bytes": 0}, "original_bytes is '0'; expected an integer"),
    "no kept tensors": ({"kept": None}, "cannot be built"),
    "an unknown form": (
        {"kept": {"form": "fp7", "constants": {}, "coded": {}, "error": 0.0}},
        "its kept tensors have an unknown form, 'fp7'",
    ),
    "terabytes of integers": (
        {"kept": {"form": "int8", "constants": {}, "coded": {"a": ["rounded", [10**12]]}, "error": 0.0}},
        "GiB; pass max_gib",
    ),
    "too few norms": ({"checks.norms": torch.zeros(3)}, "does not have one norm for each layer"),
    "a short hash": ({"checks.original": torch.zeros(31, dtype=torch.uint8)}, "does not have 32 bytes"),
    "a scale that is not finite": ({"scale": torch.tensor(float("nan"))}, "its scale is not a finite number"),
    "another scale": ({"scale": torch.tensor(3.0)}, "decodes to another network"),
    "four scales": ({"scale": torch.ones(2, 2)}, "its scale is not a finite number"),
    "a complex scale": ({"scale": torch.tensor(1j)}, "its scale is not a finite number"),
    "a short order": ({"order": torch.zeros(3, dtype=torch.uint8)}, "the coded order has 3 bytes; expected about"),
    "an order of floats": ({"order": torch.zeros(3)}, "the coded order"),
    "a wrongly shaped kept tensor": ({"kept.linear.bias": torch.zeros(11)}, "linear.bias (11,) instead of (10,)"),
    "a wrongly shaped parameter": (
        {"predictor.first.bias": torch.zeros(9)},
        "do not match its description in the header",
    ),
    "a parameter that is not finite": ({"predictor.first.bias": torch.full((8,), float("nan"))}, "another network"),
    "a layer of one dimension": ({"layers": {"conv1.weight": [16]}}, "list of two to five positive integers"),
    "a negative layer": ({"layers": {"conv1.weight": [16, -1, 3, 3]}}, "list of two to five positive integers"),
    "a boolean shape": ({"layers": {"conv1.weight": [16, True, 3, 3]}}, "list of two to five positive integers"),
    "a shape of floats": ({"layers": {"conv1.weight": [16.0, 1, 3, 3]}}, "list of two to five positive integers"),
    "a shape that is a text": ({"layers": {"conv1.weight": "abcd"}}, "list of two to five positive integers"),
    "a shape that is null": ({"layers": {"conv1.weight": None}}, "cannot be built"),
    "a huge layer": ({"layers": {"conv1.weight": [10**9, 10**9, 1, 1]}}, "GiB; pass max_gib"),
    "an enormous layer": ({"layers": {"conv1.weight": [10**400, 1, 1, 1]}}, "cannot be built"),
    "another layer": ({"layers": {"conv1.weight": [16, 1, 3, 3]}}, "expected about 6 for 16 kernels"),
    "a larger kernel": ({"layers": {"conv1.weight": [16, 1, 5, 5]}}, "kernel_size=3 is smaller than layer 'conv1'"),
    "no layer": ({"layers": {}}, "there is no weight to predict"),
    "layers in a list": ({"layers": []}, "cannot be built"),
    "an unknown form of pointwise": ({"pointwise": "skip"}, "pointwise='skip'; expected 'crop' or 'tile'"),
    "a tile without a side": ({"tile": 0}, "tile=0; expected an integer of at least 1"),
    "a boolean tile": ({"tile": True}, "tile=True; expected an integer of at least 1"),
    "a tile that is larger than a kernel": (
        {"layers": {"conv1.weight": [16, 1]}, "tile": 4},
        "kernel_size=3 is smaller than layer 'conv1' (4x4)",
    ),
    "an unknown order": ({"order": "random"}, "unknown order, 'random'"),
    "two tensors of one name": ({"aliases": {"conv1.weight": ["bn1.weight"]}}, "two tensors have the same name"),
    "an unknown alias": ({"aliases": {"conv1.weight": ["again.weight"]}}, "1 unexpected (again.weight)"),
    "aliases in a list": ({"aliases": []}, "cannot be built"),
}
#: Of the header, what `inspect` cannot show.
_UNREADABLE = {
    "no specification": {"specification": None},
    "a predictor that is a text": {"predictor": "os.system"},
    "class names that are a number": {"class_names": 3},
    "an original of 0 bytes": {"original_bytes": 0},
    "no kept tensors": {"kept": None},
    "a shape of floats": {"layers": {"conv1.weight": [16.0, 1, 3, 3]}},
}
#: Another entry of a checkpoint -> message.
_REFITTED: dict[str, tuple[Mapping[str, Any], str]] = {
    "no hyper-parameters": ({"hyper_parameters": {}}, "bad.ckpt does not say how its representation is built"),
    "hyper-parameters that are null": ({"hyper_parameters": None}, "bad.ckpt is a PyTorch file with the keys"),
    "hyper-parameters in a list": ({"hyper_parameters": [1]}, "bad.ckpt is a PyTorch file with the keys"),
    "a representation that is a text": ({_DESCRIBED: "os.system"}, "bad.ckpt: its representation cannot be built"),
    "a representation in a list": ({_DESCRIBED: [1]}, "bad.ckpt: its representation cannot be built"),
    "an empty representation": ({_DESCRIBED: {}}, "bad.ckpt: its representation cannot be built"),
    "a predictor that is a process": ({_PREDICTOR: _POPEN}, f"subprocess.Popen {_REFUSED}"),
    "a predictor that is a function": ({_PREDICTOR: "os.system"}, f"os.system {_REFUSED}"),
    "a function by way of torch": ({_PREDICTOR: "torch.os.system"}, f"posix.system {_REFUSED}"),
    "a predictor of no module": ({_PREDICTOR: "no_such_module.P"}, "there is no module 'no_such_module'"),
    "a predictor that is none": ({_PREDICTOR: {"class_path": "torch.nn.Linear"}}, "not correspond to a subclass of Pr"),
    "a predictor that is a number": ({_PREDICTOR: 7}, "Not a valid subclass of Predictor"),
    "a width that is a text": ({f"{_PREDICTOR}__init_args__hidden": "wide"}, "Got value: wide"),
    "a negative width": ({f"{_PREDICTOR}__init_args__hidden": -1}, "hidden=-1, depth=5; expected a width"),
    "a width without memory for it": ({f"{_PREDICTOR}__init_args__hidden": 10**7}, "can't allocate memory"),
    "another width": ({f"{_PREDICTOR}__init_args__hidden": 9}, "hidden is 9 here and 8 in the checkpoint"),
    "an unknown argument": ({f"{_PREDICTOR}__init_args__more": 9}, "Option 'more' is not accepted"),
    "no original": ({_ORIGINAL: None}, "bad.ckpt: its representation cannot be built"),
    "an original that is a text": ({_ORIGINAL: "digits_resnet8"}, "bad.ckpt: its representation cannot be built"),
    "an unknown network": ({f"{_ORIGINAL}__name": "no_such_net"}, "timm has no model named 'no_such_net'"),
    "an original that is gone": (
        {_ORIGINAL: {"name": "digits_resnet8", "checkpoint": "gone.pt"}},
        "bad.ckpt was fitted with gone.pt, which does not exist",
    ),
    "an original in a number": (
        {_ORIGINAL: {"name": "digits_resnet8", "checkpoint": 7}},
        "bad.ckpt: its representation cannot be built",
    ),
    "code among the arguments": (
        {_ORIGINAL: {"name": "digits_resnet8", "arguments": {"x": _POPEN}}},
        "expected a number, text or a list of them",
    ),
    "a number to start from": ({"hyper_parameters": {"init_from": 7}}, "does not say how its representation is built"),
    "a start that is gone": (
        {"hyper_parameters": {"init_from": "gone.nern"}},
        "fitted with gone.nern, which does not exist",
    ),
    "no weights": ({"state_dict": {}}, "bad.ckpt holds no representation"),
    "weights in a list": ({"state_dict": [1]}, "bad.ckpt is a PyTorch file with the keys"),
    "weights with numbers as names": ({"state_dict": {7: torch.ones(1)}}, "bad.ckpt is a PyTorch file with the keys"),
    "weights of something else": ({"state_dict": {"other": torch.ones(1)}}, "bad.ckpt holds no representation"),
    "few weights": ({"state_dict": {"representation.predictor.first.bias": torch.ones(8)}}, "Missing key(s)"),
    "extra state that is null": ({_EXTRA: None}, "it was written by another version of nernlit"),
    "extra state in a list": ({_EXTRA: [1]}, "it was written by another version of nernlit"),
    "a specification that is a number": ({f"{_EXTRA}__specification": 7}, "it was written by another version"),
    "a scale that is a text": ({f"{_EXTRA}__scale": "x"}, "it was written by another version of nernlit"),
    "a scale that is not finite": ({f"{_EXTRA}__scale": torch.tensor(float("nan"))}, "_extra_state.scale holds"),
    "a short order": (
        {f"{_EXTRA}__order": torch.zeros(3, dtype=torch.uint8)},
        "the packed order is torch.uint8 of shap",
    ),
    "another original": ({f"{_EXTRA}__original": "0" * 64}, "was fitted to another original (SHA-256 000000000000"),
    "class names that are a number": ({f"{_EXTRA}__class_names": 7}, "bad.ckpt: its representation cannot be built"),
    "a weight that is not finite": ({_BIAS: torch.full((8,), float("nan"))}, "first.bias holds values that are not"),
    "a wrongly shaped weight": ({_BIAS: torch.ones(9)}, "size mismatch for predictor.first.bias"),
    "a weight that is a text": ({_BIAS: "x"}, "received <class 'str'>"),
    "a weight of integers": ({_BIAS: torch.ones(8, dtype=torch.int64)}, "no floating-point weights: predictor.first.b"),
    "a complex weight": ({_BIAS: torch.ones(8, dtype=torch.complex64)}, "predictor.first.bias is complex64"),
    "a sparse weight": ({_BIAS: torch.ones(8).to_sparse()}, "first.bias holds values that are not finite"),
    "a weight without values": ({_BIAS: torch.ones(8, device="meta")}, "first.bias holds values that are not finite"),
}
#: Another tensor of a file of weights -> message.
_REWEIGHTED: dict[str, tuple[Mapping[str, Any], str]] = {
    "not a number": ({"conv1__weight": _CONV * float("nan")}, "144 of 144 values of conv1.weight in bad.pt are not f"),
    "infinite": ({"conv1__weight": _CONV / 0}, "144 of 144 values of conv1.weight in bad.pt are not finite"),
    "too large": ({"conv1__weight": _CONV.double() * 1e300}, "values of conv1.weight in bad.pt are not finite"),
    "wrongly shaped": ({"conv1__weight": torch.ones(3)}, "conv1.weight (3,) instead of (16, 1, 3, 3)"),
    "missing": ({"conv1__weight": None}, "1 missing (conv1.weight)"),
    "a text": ({"conv1__weight": "x"}, "1 missing (conv1.weight)"),
    "unexpected": ({"other": torch.ones(1)}, "1 unexpected (other)"),
    "integers": ({"conv1__weight": _CONV.int()}, "conv1.weight is int32"),
    "booleans": ({"conv1__weight": _CONV > 0}, "conv1.weight is bool"),
    "complex": ({"conv1__weight": _CONV.to(torch.complex64)}, "conv1.weight is complex64"),
    "sparse": ({"conv1__weight": _CONV.to_sparse()}, "conv1.weight is float32 (sparse_coo)"),
    "without values": ({"conv1__weight": _CONV.to("meta")}, "conv1.weight is float32 without values (meta)"),
    "quantized": ({"conv1__weight": torch.quantize_per_tensor(_CONV, 0.1, 0, torch.qint8)}, "conv1.weight is qint8"),
    "negative variances": ({"bn1__running_var": -torch.ones(16)}, "bn1.running_var in bad.pt has negative variances"),
}
#: Other files of weights -> message.
_WEIGHTS: dict[str, tuple[Writer, str]] = {
    "code in a torch file": (
        lambda path: torch.save({"x": Code()}, path),
        "a PyTorch file of pickled objects (builtins",
    ),
    "code in a pickle": (pickle.dumps(Code()), "it is a Python pickle, which is not loaded"),
    "two networks": (two_networks, "holds several sets of weights that fit (student, teacher)"),
    "a huge header": ((2**62).to_bytes(8, "little") + b'{"a":1}', "a file of an unknown kind (15 bytes)"),
    "a huge tensor": (
        with_header(b'{"a":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,4398046511104]}}'),
        "86 bytes instead of 4,398,046,511,190",
    ),
    "tensors that overlap": (
        with_header(
            b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
            bytes(8),
        ),
        "a damaged or truncated safetensors file",
    ),
    "an unknown type": (
        with_header(b'{"a":{"dtype":"X9","shape":[1],"data_offsets":[0,4]}}', bytes(4)),
        "cannot read weights from bad.pt",
    ),
}
_ROUNDS: dict[str, str | bytes] = {
    "empty": "",
    "no round": "[]",
    "a mapping": "{}",
    "null": "null",
    "a number": "7",
    "cut": '[{"round": 1',
    "texts": '["a"]',
    "nested": "[" * 100_000,
    "bytes": b"\xff\xfe\x00",
    "no error": '[{"round": 1}]',
    "the second alone": '[{"round": 2, "recon_rmse": 0.1}]',
    "a gap": '[{"round": 1, "recon_rmse": 0.1}, {"round": 3, "recon_rmse": 0.1}]',
    "a boolean": '[{"round": true, "recon_rmse": 0.1}]',
    **{
        f"an error of {name}": f'[{{"round": 1, "recon_rmse": {error}}}]'
        for name, error in {
            "infinity": "1e999",
            "NaN": "NaN",
            "a list": "[1]",
            "a text": '"0.1"',
            "less than 0": "-1",
            "400 digits": f"1{'0' * 400}",
            "5,000 digits": f"1{'0' * 5000}",
        }.items()
    },
}
_ROUND_FILES: dict[str, tuple[Writer, str]] = {
    "a page": ("<html>not found</html>", "round-01.safetensors is an HTML page"),
    "empty": (b"", "round-01.safetensors is an empty file (0 bytes)"),
    "another network": (
        lambda path: save_file({"a": torch.ones(3)}, path),
        "belongs to another network: conv1.weight is missing or has another shape",
    ),
    "not finite": (
        lambda path: save_file({**load_file(path), "conv1.weight": _CONV * float("nan")}, path),
        "round-01.safetensors is damaged: conv1.weight is not finite",
    ),
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:-9]), "expected the network of a round"),
    "gone": (Path.unlink, "round-01.safetensors is missing: the network of round 1"),
}
_TABLES: dict[str, tuple[str, dict[str, Writer], str]] = {
    "empty": (SWEEP, {"sweep.csv": ""}, "sweep.csv is not a table of this version of nernlit"),
    "other columns": (SWEEP, {"sweep.csv": "a,b\n1,2\n"}, "sweep.csv is not a table of this version of nernlit"),
    "more columns": (SWEEP, {"sweep.csv": SWEEP_HEAD + "1," * 30}, "sweep.csv, line 2: expected 22 values"),
    "cut": (SWEEP, {"sweep.csv": SWEEP_HEAD + "1,2"}, "sweep.csv, line 2: expected 22 values"),
    "an open quote": (SWEEP, {"sweep.csv": SWEEP_HEAD + '"open'}, "no table of fits: unexpected end of data"),
    "bytes": (SWEEP, {"sweep.csv": b"\xff\xfe\x00"}, "no table of fits: 'utf-8' codec"),
    "a long field": (SWEEP, {"sweep.csv": SWEEP_HEAD + "x" * 200_000}, "field larger than field limit"),
    "a NUL": (SWEEP, {"sweep.csv": SWEEP_HEAD + "\0"}, "sweep.csv, line 2: expected 22 values"),
    "NaN": (SWEEP, swept(acc="nan"), "sweep.csv, line 2: acc is 'nan', which is invalid"),
    "infinity": (SWEEP, swept(acc="1e999"), "sweep.csv, line 2: acc is '1e999', which is invalid"),
    "a word": (SWEEP, swept(acc="high"), "sweep.csv, line 2: acc is 'high', which is invalid"),
    "a width that is a word": (SWEEP, swept(hidden="wide"), "sweep.csv, line 2: hidden is 'wide', which is invalid"),
    "a result that is empty": (SWEEP, {RESULT: ""}, f"{RESULT} cannot be read: Expecting value"),
    "a result that is cut": (SWEEP, {RESULT: '{"config": "x'}, "test.json cannot be read: Unterminated string"),
    "a result of bytes": (SWEEP, {RESULT: b"\xff\xfe\x00"}, "test.json cannot be read: 'utf-16"),
    "a result that is nested": (SWEEP, {RESULT: "[" * 100_000}, "test.json cannot be read: "),
    "a result that is a list": (SWEEP, {RESULT: "[]"}, "test.json is not a result file of this version"),
    "a result of another kind": (SWEEP, {RESULT: '{"acc": 1}'}, "test.json is not a result file of this version"),
    "a result that is a folder": (SWEEP, {f"{RESULT}/file": ""}, "test.json cannot be read: "),
    "a result of NaN": (SWEEP, tested(acc=float("nan")), "test.json: acc is 'nan', which is invalid; delete it"),
    "a result of a list": (SWEEP, tested(acc=[1]), "test.json: acc is '[1]', which is invalid; delete it"),
    "a result of a huge number": (SWEEP, tested(acc=10**400), "test.json: acc is '1000"),
    "a seed that is a word": (SWEEP, tested(seed="a"), "test.json: seed is 'a', which is invalid"),
    "empty, of compare": (COMPARE, {"compare.csv": ""}, "compare.csv is not a table of this version of nernlit"),
    "of a sweep": (COMPARE, {"compare.csv": SWEEP_HEAD}, "compare.csv is not a table of this version of nernlit"),
    "a setting that is a word": (
        COMPARE,
        compared(setting="x"),
        "compare.csv, line 2: setting is 'x', which is invalid",
    ),
    "a fraction of a byte": (
        COMPARE,
        compared(bytes="1.5"),
        "compare.csv, line 2: bytes is '1.5', which is invalid",
    ),
    "an original of 0 bytes": (
        COMPARE,
        compared(original_bytes="0"),
        "line 2: original_bytes is '0', which is invalid",
    ),
    "another original": (COMPARE, compared(original="x"), "was written with original 'x'"),
    "other data": (COMPARE, compared(data="x"), "was written with data 'x'"),
}
_YAML: dict[str, tuple[Writer, str]] = {
    "empty": ("", "bad.yaml is empty; expected options"),
    "a list": ("[1, 2]", "bad.yaml holds no options"),
    "a text": ("hello", "bad.yaml holds no options"),
    "cut": ("data: {a: [", "bad.yaml is not valid YAML"),
    "a tab": ("a:\n\tb: 1\n", "bad.yaml is not valid YAML"),
    "nested": ("a: " + "[" * 100_000, "bad.yaml is not valid YAML: maximum recursion depth"),
    "bytes": (bytes(range(256)), "bad.yaml is not a text file in UTF-8"),
    "a call": (
        "model: !!python/object/apply:os.system ['touch ran']",
        "bad.yaml is not a valid configuration: could not",
    ),
    "a function": ("model: !!python/name:os.system", "bad.yaml is not a valid configuration: could not determine"),
    "billions of values": (aliases(), "bad.yaml has more than 100,000 values"),
    "a list in itself": ("a: &a [*a]\nbase: *a\n", "bad.yaml has more than 100,000 values"),
    "a name twice": ("model: 1\nmodel: 2\n", "bad.yaml, line 2: 'model' is given again"),
    "a list as a name": ("[1]: 2\n", "bad.yaml, line 1: a list or a mapping as a name"),
    "numbers as bases": ("base: [1, 2]", "bad.yaml: base: [1, 2]; expected a list of YAML files"),
    "a mapping as base": ("base: {a: b}", "bad.yaml: base: {'a': 'b'}; expected a list of YAML files"),
    "itself as base": ("base: bad.yaml", "bad.yaml builds on itself"),
    "a base that is gone": ("base: gone.yaml", "bad.yaml: base: no configuration file gone.yaml"),
    "a NUL in a name": ('base: "a\\0b"\n', "bad.yaml: base: no configuration file a"),
    "an unknown schedule": ("base: digits_h96\nschedule: slow\n", "bad.yaml: schedule: slow: expected one of fast, pa"),
    "a number as a section": ("base: digits_h96\npaper: 7\n", "bad.yaml: paper: expected options such as"),
    "a list of pairs": ("base: digits_h96\nwith: [1]\n", "bad.yaml: with: expected names of files"),
    "a date that does not exist": ("base: digits_h96\nseed_everything: 2001-13-44\n", "month must be in 1..12"),
    "a number as trainer": ("base: digits_h96\ntrainer: 7\n", "bad.yaml: trainer: expected options such as"),
    "a scheme that is a function": (
        f"{_YAML_CODE}model: {{class_path: os.system, init_args: {{command: touch ran}}}}\n",
        f"--model: os.system {_REFUSED}",
    ),
    "data that are a process": (
        f"{_YAML_CODE}data: {{class_path: subprocess.Popen, init_args: {{args: [touch, ran]}}}}\n",
        f"--data: subprocess.Popen {_REFUSED}",
    ),
    "a callback that is a process": (
        f"{_YAML_CODE}trainer: {{callbacks: [{{class_path: subprocess.Popen, init_args: {{args: [touch, ran]}}}}]}}\n",
        f"--trainer.callbacks: subprocess.Popen {_REFUSED}",
    ),
    "an optimizer that is a function": (
        f"{_YAML_CODE}model: {{init_args: {{optimizer: os.system}}}}\n",
        f"--model.optimizer: os.system {_REFUSED}",
    ),
    "a function by way of torch": (
        f"{_YAML_CODE}model: {{init_args: {{optimizer: torch.os.system}}}}\n",
        f"--model.optimizer: posix.system {_REFUSED}",
    ),
    "a predictor that is a process": (
        f"{_YAML_CODE}model: {{init_args: {{representation: {{predictor: subprocess.Popen}}}}}}\n",
        f"--model.representation.predictor: subprocess.Popen {_REFUSED}",
    ),
    "a class that is a list": (
        f"{_YAML_CODE}data: {{class_path: [1]}}\n",
        "--data {'class_path': [1]}: expected one of",
    ),
    "a class that is null": (
        f"{_YAML_CODE}model: {{class_path: null}}\n",
        "--model {'class_path': None}: expected one",
    ),
    "a class that is a module": (f"{_YAML_CODE}data: {{class_path: torch}}\n", "--data {'class_path': 'torch'}: expec"),
    "a class that is not there": (f"{_YAML_CODE}data: nernlit.data.os\n", "nernlit.data has no os; expected one of"),
}
_CONFIG: dict[str, tuple[str, str]] = {
    "empty": ("", "run/config.yaml is empty"),
    "a list": ("[1]", "run/config.yaml holds no options"),
    "cut": ("data: {a: [", "run/config.yaml is not valid YAML"),
    "a call": (
        'data: !!python/object/apply:os.system ["touch ran"]',
        "run/config.yaml is not a valid configuration: could not",
    ),
    "no data": ("data: null", "run was fitted without data"),
    "other options": ("trainer: {}", "run was fitted without data"),
    "a function": (
        "data: {class_path: os.system, init_args: {command: touch ran}}",
        f"--data: os.system {_REFUSED}",
    ),
    "data in a list": ("data: [1, 2]", "--data [1, 2]: expected one of CIFAR100DataModule"),
    "a huge batch": ("data: {class_path: DigitsDataModule, init_args: {batch_size: 1.0e+300}}", "--data.batch_size"),
    "a negative batch": (
        "data: {class_path: DigitsDataModule, init_args: {eval_batch_size: -1}}",
        "eval_batch_size=-1; expected at least 1",
    ),
    "an unknown option": ("data: {class_path: DigitsDataModule, init_args: {wings: 2}}", "has no option 'wings'"),
    "billions of values": (aliases(), "run/config.yaml has more than 100,000 values"),
}
_UNIDENTIFIED = "images/test/3/0.png is not a readable image (UnidentifiedImageError"
_IMAGES: dict[str, tuple[Writer, str]] = {
    "empty": (b"", _UNIDENTIFIED),
    "a page": ("<html>", _UNIDENTIFIED),
    "a program": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n", _UNIDENTIFIED),
    "a drawing": ("<svg onload='x'/>", _UNIDENTIFIED),
    "a pickle": (pickle.dumps(Code()), _UNIDENTIFIED),
    "no pixels": (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 0, 0, 8, 0, 0, 0, 0)) + chunk(b"IEND", b""),
        "images/test/3/0.png is not a readable image",
    ),
    "billions of pixels": (bomb(), "DecompressionBombError: Image size (400000000 pixels)"),
    "cut": (png(cut=200), "OSError: image file is truncated"),
    "an empty profile": (png(chunk(b"iCCP", b"")), "images/test/3/0.png is not a readable image"),
    "an empty gamma": (png(chunk(b"gAMA", b"")), "images/test/3/0.png is not a readable image"),
    "pixels that are no numbers": (
        lambda path: Image.fromarray(np.full((8, 8), np.nan, np.float32)).save(path, "TIFF"),
        "pixels from nan to nan",
    ),
    "a link to nothing": (replaced(lambda path: path.symlink_to("nowhere")), "OSError: there is no such file"),
    "a pipe": (replaced(os.mkfifo), "OSError: not a regular file"),
}
_TREES: dict[str, tuple[dict[str, Writer], str]] = {
    "no folder": ({"images": shutil.rmtree}, "images has none of train/, val/, test/"),
    "no test images": (
        {"images/test": shutil.rmtree},
        "images has train of train/, val/, test/; expected images/train",
    ),
    "a file for a folder": (
        {"images/test": replaced(Path.touch)},
        "images has train of train/, val/, test/; expected",
    ),
    "a class less": ({"images/test/3": shutil.rmtree}, "has 9 class folders, images/train has 10; they differ in 3"),
    "a class more": ({"images/test/10/0.png": png()}, "has 11 class folders, images/train has 10; they differ in 10"),
    "empty classes": (dict.fromkeys(_EVERY_CLASS, replaced(Path.mkdir)), "images/test: no image in 0, 1, 2, 3, 4 and"),
}
_ARRAYS: dict[str, tuple[dict[str, Writer], str]] = {
    "labels that are gone": ({"c/labels.npy": Path.unlink}, "cannot read c/labels.npy ([Errno 2]"),
    "images that are gone": ({"c/fog.npy": Path.unlink}, "cannot read c/fog.npy ([Errno 2]"),
    "labels of a page": ({"c/labels.npy": "<html>"}, "cannot read c/labels.npy"),
    "no labels": ({"c/labels.npy": b""}, "cannot read c/labels.npy"),
    "code as labels": (
        {"c/labels.npy": array(np.array([Code()] * 50, dtype=object), allow_pickle=True)},
        "cannot read c/labels.npy (Array can't be memory-mapped: Python objects",
    ),
    "fractions as labels": ({"c/labels.npy": array(np.zeros(50))}, "c/labels.npy is float64 of shape (50,)"),
    "labels out of range": ({"c/labels.npy": array(np.full(50, 10))}, "has labels from 10 to 10; expected 0 to 9"),
    "negative labels": ({"c/labels.npy": array(np.full(50, -1))}, "has labels from -1 to -1; expected 0 to 9"),
    "a label less": (
        {"c/labels.npy": array(np.zeros(49, int))},
        "of shape (49,); expected integers of shape (50,)",
    ),
    "one label": ({"c/labels.npy": array(np.array(3))}, "of shape (); expected integers of shape (50,)"),
    "other labels": ({"c/labels.npy": array(np.zeros(50, int))}, "does not have the labels of the clean test images"),
    "images cut": (
        {"c/fog.npy": lambda path: path.write_bytes(path.read_bytes()[:-9])},
        "cannot read c/fog.npy (mmap length is greater than file size)",
    ),
    "small images": ({"c/fog.npy": array(np.zeros((50, 8, 8, 3), np.uint8))}, "is uint8 of shape (50, 8, 8, 3)"),
    "images of floats": ({"c/fog.npy": array(np.zeros((50, 32, 32, 3)))}, "is float64 of shape (50, 32, 32, 3)"),
    "billions of images": (
        {
            "c/fog.npy": b"\x93NUMPY\x01\x00\x46\x00"
            b"{'descr':'|u1','fortran_order':False,'shape':(99999999999,32,32,3),}    \n"
        },
        "cannot read c/fog.npy",
    ),
    "an archive": ({"c/fog.npy": KINDS["npz"][0]()}, "cannot read c/fog.npy (the magic string is not correct"),
}
#: Of the kinds of foreign files, those that hold what the reader looks for.
_WITH_WEIGHTS = (
    "nern",
    "safetensors",
    "weights",
    "legacy weights",
    "nested",
    "old nern",
    "tensor",
    "list",
    "lightning",
)

BAD_INPUTS: dict[str, BadInput] = {
    **{
        f".nern file: {kind}": BadInput(
            RECONSTRUCT, {"bad.nern": content()}, f"bad.nern is {described}; expected a .nern"
        )
        for kind, (content, described) in KINDS.items()
        if kind != "nern"
    },
    **{
        f"checkpoint: {kind}": BadInput(
            EXPORT, {"bad.ckpt": content()}, f"bad.ckpt is {described}. Pass a .ckpt that a"
        )
        for kind, (content, described) in KINDS.items()
        if kind != "nern"  # known by its content
    },
    "checkpoint: nern": BadInput(EXPORT, {"bad.ckpt": KINDS["nern"][0]()}, "bad.ckpt is damaged: its checksum is"),
    "weights: nern": BadInput(COMPRESS, {"bad.pt": KINDS["nern"][0]()}, "bad.pt is damaged: its checksum is wrong"),
    **{
        f"weights: {kind}": BadInput(
            COMPRESS, {"bad.pt": content()}, f"cannot read weights from bad.pt: it is {described}."
        )
        for kind, (content, described) in KINDS.items()
        if kind not in _WITH_WEIGHTS
    },
    ".nern file: cut": BadInput(
        RECONSTRUCT, {"bad.nern": changed_bytes(lambda old: old[:-7])}, "its checksum is wrong"
    ),
    ".nern file: longer": BadInput(
        RECONSTRUCT, {"bad.nern": changed_bytes(lambda old: old + b"x")}, "checksum is wrong"
    ),
    ".nern file: a flipped bit": BadInput(
        RECONSTRUCT,
        {"bad.nern": changed_bytes(lambda old: old[:300] + bytes([old[300] ^ 1]) + old[301:])},
        "bad.nern is damaged: its checksum is wrong",
    ),
    ".nern file: another version": BadInput(
        RECONSTRUCT,
        {"bad.nern": changed_bytes(lambda old: old[:5] + b"\x07" + old[6:])},
        f"bad.nern has format version 7, and this nernlit reads version {VERSION}",
    ),
    ".nern file: gone": BadInput("inspect gone.nern", {}, "gone.nern is missing; expected a .nern file"),
    "checkpoint: gone": BadInput("export gone.ckpt -o out.nern", {}, "gone.ckpt is not a run"),
    "checkpoint: in itself": BadInput(
        EXPORT, {"bad.ckpt": saved_in_itself()}, "bad.ckpt is damaged: state_dict contains itself"
    ),
    "weights: gone": BadInput(COMPRESS.replace("bad", "gone"), {}, "no file at gone.pt; expected a file of weights"),
    "weights: a folder": BadInput(
        COMPRESS.replace("bad.pt", "images"), {}, "images is not a run: no checkpoints/best.ckpt"
    ),
    **{
        f"weights: a checkpoint with {name}": BadInput(
            "compress bad.ckpt -o out.nern --data DigitsDataModule",
            {"bad.ckpt": refitted(hyper_parameters={"original": original})},
            message,
        )
        for name, (original, message) in _TRAINED.items()
    },
    **{f"forged: {n}": BadInput(RECONSTRUCT, {"bad.nern": forged(**c)}, m) for n, (c, m) in _FORGED.items()},
    **{
        f"inspected: {name}": BadInput(
            INSPECT, {"bad.nern": forged(**changes)}, "bad.nern describes a representation that"
        )
        for name, changes in _UNREADABLE.items()
    },
    **{f"checkpoint: {n}": BadInput(EXPORT, {"bad.ckpt": refitted(**c)}, m) for n, (c, m) in _REFITTED.items()},
    **{f"weights: {n}": BadInput(COMPRESS, {"bad.pt": reweighted(**c)}, m) for n, (c, m) in _REWEIGHTED.items()},
    **{f"weights: {n}": BadInput(COMPRESS, {"bad.pt": c}, m) for n, (c, m) in _WEIGHTS.items()},
    **{
        f"rounds.json: {name}": BadInput(
            ROUNDS, {"run/rounds/rounds.json": content}, "run/rounds/rounds.json is damaged"
        )
        for name, content in _ROUNDS.items()
    },
    **{
        f"network of a round: {name}": BadInput(ROUNDS, {"run/rounds/round-01.safetensors": content}, message)
        for name, (content, message) in _ROUND_FILES.items()
    },
    **{f"table: {n}": BadInput(*row) for n, row in _TABLES.items()},
    **{f"YAML: {n}": BadInput(FIT, {"bad.yaml": c}, m) for n, (c, m) in _YAML.items()},
    **{f"config.yaml: {n}": BadInput(INTERPOLATE, {"run/config.yaml": c}, m) for n, (c, m) in _CONFIG.items()},
    **{f"image: {n}": BadInput(TEST, {"images/test/3/0.png": c}, m) for n, (c, m) in _IMAGES.items()},
    **{f"image folder: {n}": BadInput(TEST, files, m) for n, (files, m) in _TREES.items()},
    **{f".npy: {n}": BadInput(CIFAR_C, files, m) for n, (files, m) in _ARRAYS.items()},
}
