import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from nernlit.originals import Original

README = Path(__file__).parent.parent / "README.md"


def test_the_library_example_shows_how_far_it_is_and_learns(capsys: pytest.CaptureFixture[str]) -> None:
    _, example = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    torch.manual_seed(0)
    exec(example, {})
    *steps, last = capsys.readouterr().out.splitlines()
    explained = [float(found) for found in re.findall(r"step \d+: explained power (-?[\d.]+)%", "\n".join(steps))]
    assert len(explained) == len(steps) == 6
    assert explained[-1] > 50 > explained[0]
    assert last.startswith("Sizes(predictor_params=")
    saved = torch.load("reconstructed.pt", weights_only=True)
    Original("digits_resnet8").net.load_state_dict(saved)


def test_the_compression_example_writes_a_file_and_gives_a_module() -> None:
    example, _ = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    short = example.replace("target_bytes=3_000_000", "target_bytes=60_000, steps=2")
    given: dict[str, Any] = {"net": timm.create_model("cifar_resnet20"), "batches": [torch.rand(4, 3, 32, 32)]}
    exec(short, given)
    assert Path("small.nern").stat().st_size < 70_000
    assert given["plain_module"](torch.rand(2, 3, 32, 32)).shape == (2, 10)
