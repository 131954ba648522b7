from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from nernlit.errors import CheckpointError, UsageError
from nernlit.originals import Original, read_state_dict
from tests.fakes import tiny_original

STATE = {"conv.weight": torch.ones(2, 1, 3, 3), "linear.bias": torch.zeros(4)}


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".th", ".ckpt"])
@pytest.mark.parametrize("nest", [None, "state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module.", "model.", "module.model."])
def test_weights_are_found_in_every_wrapping(tmp_path: Path, suffix: str, nest: str | None, prefix: str) -> None:
    wrapped: dict[str, Any] = {prefix + key: value for key, value in STATE.items()}
    path = tmp_path / f"weights{suffix}"
    torch.save({nest: wrapped, "epoch": 3} if nest else wrapped, path)
    loaded = read_state_dict(path)
    assert {key: value.tolist() for key, value in loaded.items()} == {k: v.tolist() for k, v in STATE.items()}


def test_safetensors_are_read(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "w.safetensors")
    assert list(read_state_dict(tmp_path / "w.safetensors")) == list(STATE)


class Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("executed"),)


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    torch.save({"state_dict": STATE, "extra": Payload()}, tmp_path / "evil.pt")
    with pytest.raises(CheckpointError, match="Only tensors are loaded, never code"):
        read_state_dict(tmp_path / "evil.pt")
    assert not Path("executed").exists()


def test_files_that_are_no_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no file at .*nowhere\.pt; expected a CNN's weights"):
        read_state_dict(tmp_path / "nowhere.pt")
    for name in ("garbage.pt", "garbage.safetensors"):
        (tmp_path / name).write_bytes(b"garbage garbage garbage")
        with pytest.raises(CheckpointError, match=f"cannot read weights from .*{name}"):
            read_state_dict(tmp_path / name)
    torch.save({"epoch": 3}, tmp_path / "empty.pt")
    with pytest.raises(CheckpointError, match="holds no named tensors"):
        read_state_dict(tmp_path / "empty.pt")


def test_a_mismatch_lists_missing_unexpected_and_wrongly_shaped_keys(tmp_path: Path) -> None:
    state = Original("cifar_resnet20").net.state_dict()
    state["linear.weight"] = torch.zeros(5, 64)
    state["stray"] = torch.zeros(1)
    for key in [key for key in state if key.startswith("layer3.")]:
        del state[key]
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError) as caught:
        Original("cifar_resnet20", checkpoint=str(tmp_path / "w.safetensors"))
    message = str(caught.value)
    assert "30 missing (layer3.0.conv1.weight, layer3.0.bn1.weight, layer3.0.bn1.bias, ...)" in message
    assert "1 unexpected (stray)" in message
    assert "1 wrongly shaped (linear.weight (5, 64) instead of (10, 64))" in message


def test_an_original_normalises_pixels_itself() -> None:
    original = tiny_original().eval()
    images = torch.rand(2, 1, 8, 8)
    assert torch.equal(original(images), original.net((images - 0.5) / 0.5))


def test_statistics_default_to_what_timm_says_and_must_fit_the_channels() -> None:
    assert Original("cifar_resnet20").mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])
    with pytest.raises(UsageError, match="mean has 2 numbers, but 'cifar_resnet20' takes images of 3 channels"):
        Original("cifar_resnet20", mean=[0.5, 0.5])


def test_unknown_names_and_untrained_networks_are_refused() -> None:
    with pytest.raises(UsageError, match=r"no model named .cifar_resnet21.; did you mean .*cifar_resnet20"):
        Original("cifar_resnet21")
    with pytest.raises(UsageError, match=r"has random weights; pass --model\.representation\.original\.checkpoint"):
        Original("cifar_resnet20").require_weights()
    with pytest.raises(UsageError, match="both checkpoint='x' and pretrained=true"):
        Original("cifar_resnet20", checkpoint="x", pretrained=True)


def test_the_fingerprint_changes_with_a_single_bit() -> None:
    one, two = tiny_original(), tiny_original()
    assert one.fingerprint() == two.fingerprint()
    with torch.no_grad():
        two.net.get_parameter("head.bias")[0] += 1e-6
    assert one.fingerprint() != two.fingerprint()
