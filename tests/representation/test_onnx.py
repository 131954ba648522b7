from pathlib import Path

import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator

from nernlit.errors import UsageError
from nernlit.originals import Original
from nernlit.predictors import Quantize, Table
from nernlit.representation import Representation, write_onnx
from nernlit.representation import onnx as onnx_file
from tests.fakes import NEEDS_ONNX, digits_representation, tiny_representation

pytestmark = NEEDS_ONNX


@pytest.mark.parametrize("batch", [1, 5])
def test_an_onnx_model_gives_the_same_logits_for_pixels(tmp_path: Path, batch: int) -> None:
    representation = digits_representation()
    representation.original.mean.fill_(0.3)
    write_onnx(representation, tmp_path / "net.onnx")
    model = onnx.load(tmp_path / "net.onnx")
    onnx.checker.check_model(model)
    images = torch.rand(batch, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    (logits,) = ReferenceEvaluator(model).run(None, {"pixels": images.numpy()})
    assert torch.allclose(torch.from_numpy(logits), representation(images), atol=1e-5)
    assert model.graph.output[0].name == "logits"
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert [file.name for file in tmp_path.iterdir()] == ["net.onnx"]
    assert b"nernlit/" not in (tmp_path / "net.onnx").read_bytes()  # no path of this machine


def test_a_network_without_a_stated_image_size_needs_one(tmp_path: Path) -> None:
    representation = tiny_representation()
    with pytest.raises(UsageError, match="'TinyCNN' does not state the size of its images; pass the image size"):
        write_onnx(representation, tmp_path / "net.onnx")
    write_onnx(representation, tmp_path / "net.onnx", image_size=8)
    images = torch.rand(2, 1, 8, 8)
    (logits,) = ReferenceEvaluator(str(tmp_path / "net.onnx")).run(None, {"pixels": images.numpy()})
    assert torch.allclose(torch.from_numpy(logits), representation(images), atol=1e-5)


VIT = {"num_classes": 10, "in_chans": 1, "mean": [0.3], "std": [0.38]}


@pytest.mark.parametrize(("network", "bits", "bytes_per_weight"), [("digits_resnet8", 2.0, 0.6), ("test_vit", 5.0, 1)])
def test_integers_stay_integers_in_a_model(tmp_path: Path, network: str, bits: float, bytes_per_weight: float) -> None:
    torch.manual_seed(0)
    vit = {**VIT, "arguments": {"img_size": 8, "patch_size": 2, "depth": 1}}
    original = Original(network, pretrained=True) if network != "test_vit" else Original("test_vit", **vit)
    table, per = Table(4, scale="layer"), Quantize(bits, "row" if network == "test_vit" else "tensor")
    representation = Representation(original, table, layers="all", order="none", pointwise="tile", quantize=per)
    write_onnx(representation, tmp_path / "net.onnx", image_size=8, integers=True)
    model = onnx.load(tmp_path / "net.onnx")
    onnx.checker.check_model(model, full_check=True)
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    integers = {name.removesuffix(".integers"): tensor for name, tensor in stored.items() if ".integers" in name}
    assert list(integers) == list(representation.weights())
    for key, tensor in integers.items():
        step = onnx.numpy_helper.to_array(stored[f"{key}.steps"])
        whole = onnx.numpy_helper.to_array(tensor).astype("int32")
        assert tensor.data_type == (onnx.TensorProto.INT4 if abs(whole).max() <= 7 else onnx.TensorProto.INT8)
        weight = torch.from_numpy((whole.reshape(len(whole), -1) * step.reshape(-1, 1)).reshape(whole.shape))
        assert torch.allclose(weight.float(), representation.weights()[key], rtol=1e-5, atol=0)
    assert [value.name for value in model.graph.input] == ["pixels"]
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    dequantized = [node.output[0] for node in model.graph.node if node.op_type == "DequantizeLinear"]
    assert dequantized == list(integers)
    assert (
        sum(len(tensor.raw_data) for tensor in integers.values())
        <= bytes_per_weight * representation.layout.num_weights
    )
    images = torch.rand(3, 1, 8, 8)
    (logits,) = ReferenceEvaluator(model).run(None, {"pixels": images.numpy()})
    assert torch.allclose(torch.from_numpy(logits), representation(images), atol=1e-4)
    kept = sum(value.numel() for value in original.net.state_dict().values()) - representation.layout.num_weights
    size = (tmp_path / "net.onnx").stat().st_size
    assert size < 4 * kept + bytes_per_weight * representation.layout.num_weights + 25_000  # the graph itself


def test_integers_that_a_predictor_lacks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="weights as integers need a quantized Table; MLP is not quantized"):
        write_onnx(digits_representation(), tmp_path / "net.onnx", integers=True)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_written_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"net\.pt: expected a file name that ends in \.onnx"):
        write_onnx(digits_representation(), tmp_path / "net.pt")
    with pytest.raises(UsageError, match="torch cannot export 'digits_resnet8' for images of 0x0 pixels: "):
        write_onnx(digits_representation(), tmp_path / "net.onnx", image_size=0)
    monkeypatch.setattr(onnx_file, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"needs the Python package onnx and onnxscript; .* 'nernlit\[onnx\]'"):
        write_onnx(digits_representation(), tmp_path / "net.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("bits", "integers"), [(4.0, False), (2.0, True), (5.0, True)])  # fp32, int4 and int8
def test_onnx_runtime_gives_the_logits_of_the_network(tmp_path: Path, bits: float, integers: bool) -> None:
    runtime = pytest.importorskip("onnxruntime")
    original = Original("digits_resnet8", pretrained=True)
    representation = Representation(
        original, Table(3, scale="filter"), layers="all", order="none", pointwise="tile", quantize=Quantize(bits)
    )
    write_onnx(representation, tmp_path / "net.onnx", integers=integers)
    session = runtime.InferenceSession(tmp_path / "net.onnx", providers=["CPUExecutionProvider"])
    for batch in (1, 7):
        images = torch.rand(batch, 1, 8, 8, generator=torch.Generator().manual_seed(batch))
        (logits,) = session.run(["logits"], {"pixels": images.numpy()})
        with torch.no_grad():
            expected = representation(images)
        assert logits.shape == (batch, 10)
        assert torch.allclose(torch.from_numpy(logits), expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(torch.from_numpy(logits).argmax(1), expected.argmax(1))


def test_the_image_size_is_that_of_the_networks_arguments(tmp_path: Path) -> None:
    arguments = {"img_size": [8, 16], "patch_size": 4, "depth": 1}
    original = Original("test_vit", num_classes=4, in_chans=1, mean=[0.3], std=[0.4], arguments=arguments)
    assert original.image_size == (8, 16)
    representation = Representation(original, Table(4), layers="all", order="none", pointwise="tile")
    write_onnx(representation, tmp_path / "net.onnx")
    shape = onnx.load(tmp_path / "net.onnx").graph.input[0].type.tensor_type.shape.dim
    assert [size.dim_value for size in shape[1:]] == [1, 8, 16]


def test_colors_of_torchs_messages_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("\x1b[96mThis is step 1/3\x1b[0m") from ValueError("\x1b[91mnot\x1b[0m that size")

    monkeypatch.setattr(torch.onnx, "export", fail)
    with pytest.raises(UsageError, match=r"for images of 8x8 pixels: not that size$"):
        write_onnx(digits_representation(), tmp_path / "net.onnx")
