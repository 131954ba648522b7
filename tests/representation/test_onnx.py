from pathlib import Path

import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator

from nernlit.errors import UsageError
from nernlit.representation import onnx as onnx_file
from nernlit.representation import write_onnx
from tests.fakes import digits_representation, tiny_representation


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
    assert [file.name for file in tmp_path.iterdir()] == ["net.onnx"]


def test_a_network_without_a_stated_image_size_needs_one(tmp_path: Path) -> None:
    representation = tiny_representation()
    with pytest.raises(UsageError, match="'TinyCNN' does not state the size of its images; pass the image size"):
        write_onnx(representation, tmp_path / "net.onnx")
    write_onnx(representation, tmp_path / "net.onnx", image_size=8)
    images = torch.rand(2, 1, 8, 8)
    (logits,) = ReferenceEvaluator(str(tmp_path / "net.onnx")).run(None, {"pixels": images.numpy()})
    assert torch.allclose(torch.from_numpy(logits), representation(images), atol=1e-5)


def test_what_cannot_be_written_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"net\.pt: expected a file name that ends in \.onnx"):
        write_onnx(digits_representation(), tmp_path / "net.pt")
    with pytest.raises(UsageError, match="torch cannot export 'digits_resnet8' for images of 0x0 pixels: "):
        write_onnx(digits_representation(), tmp_path / "net.onnx", image_size=0)
    monkeypatch.setattr(onnx_file, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"needs the Python package onnx and onnxscript; .* 'nernlit\[onnx\]'"):
        write_onnx(digits_representation(), tmp_path / "net.onnx")
    assert not list(tmp_path.iterdir())
