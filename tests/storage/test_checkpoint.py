import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from nernlit.callbacks import DurableCheckpointIO
from nernlit.errors import CheckpointError, StorageError
from nernlit.storage.checkpoint import newest_intact_checkpoint, read_checkpoint
from tests.storage.test_files import files_of_at_most

CHECKPOINT: dict[str, Any] = {
    "pytorch-lightning_version": "2.6.0",
    "global_step": 7,
    "state_dict": {f"representation.{number}": torch.arange(2000.0) + number for number in range(5)},
    "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(10)}}, "param_groups": [{"lr": 0.1}]}],
}


def _save(path: str, **changes: Any) -> Path:
    DurableCheckpointIO().save_checkpoint({**CHECKPOINT, **changes}, path)
    return Path(path)


@pytest.mark.parametrize("seed", range(20))
def test_forty_flipped_bytes_are_refused_by_name(seed: int) -> None:
    content = bytearray(_save("last.ckpt").read_bytes())
    numbers = random.Random(seed)
    for place in numbers.sample(range(len(content)), 40):
        content[place] ^= 1 << numbers.randrange(8)
    Path("last.ckpt").write_bytes(content)
    with pytest.raises(CheckpointError) as raised:
        read_checkpoint("last.ckpt")
    assert str(raised.value).startswith("last.ckpt is a damaged or truncated zip file (")
    assert "\n" not in str(raised.value)


def test_a_flipped_bit_anywhere_is_refused_or_changes_nothing() -> None:
    whole = _save("last.ckpt").read_bytes()
    for place in range(0, len(whole), 97):
        content = bytearray(whole)
        content[place] ^= 16
        Path("last.ckpt").write_bytes(content)
        try:
            read = read_checkpoint("last.ckpt")
        except CheckpointError:
            continue
        assert read["global_step"] == 7
        for name, tensor in CHECKPOINT["state_dict"].items():
            assert torch.equal(read["state_dict"][name], tensor), f"byte {place}"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_and_optimizer_states_must_be_finite(value: float) -> None:
    _save("a.ckpt", state_dict={"representation.w": torch.tensor([1.0, value])})
    with pytest.raises(
        CheckpointError, match=r"a\.ckpt is damaged, or its fit diverged: state_dict\.representation\.w"
    ):
        read_checkpoint("a.ckpt")
    _save("b.ckpt", optimizer_states=[{"state": {0: {"exp_avg": torch.tensor(value)}}}])
    with pytest.raises(CheckpointError, match=r"optimizer_states\.0\.state\.0\.exp_avg holds values that are not"):
        read_checkpoint("b.ckpt")
    _save("c.ckpt", optimizer_states=[{"param_groups": [{"lr": value}]}])
    with pytest.raises(CheckpointError, match=r"optimizer_states\.0\.param_groups\.0\.lr"):
        read_checkpoint("c.ckpt")


@pytest.mark.parametrize("clock", [1, -1])
def test_the_newest_whole_checkpoint_is_found(clock: int) -> None:
    for time, name in enumerate(("oldest", "best", "last")):
        os.utime(_save(f"checkpoints/{name}.ckpt", global_step=time), (9 + clock * time, 9 + clock * time))
    last = Path("checkpoints/last.ckpt")
    last.write_bytes(last.read_bytes()[:1000])
    found = newest_intact_checkpoint(Path("checkpoints"))
    assert found is not None
    assert (found[0].name, found[1]["global_step"]) == ("best.ckpt", 1)
    assert newest_intact_checkpoint(Path("nowhere")) is None


def test_a_full_disk_keeps_the_former_checkpoint() -> None:
    former = _save("checkpoints/last.ckpt").read_bytes()
    with files_of_at_most(10_000), pytest.raises(StorageError, match=r"cannot write checkpoints/last\.ckpt"):
        _save("checkpoints/last.ckpt", global_step=8)
    assert Path("checkpoints/last.ckpt").read_bytes() == former
    assert [file.name for file in Path("checkpoints").iterdir()] == ["last.ckpt"]
