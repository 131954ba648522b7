import re
from pathlib import Path

import pytest
import torch

from nernlit.originals import Original

README = Path(__file__).parent.parent / "README.md"


def test_the_library_example_shows_how_far_it_is_and_learns(capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    torch.manual_seed(0)
    exec(example, {})
    *steps, last = capsys.readouterr().out.splitlines()
    explained = [float(found) for found in re.findall(r"step \d+: explained power (-?[\d.]+)%", "\n".join(steps))]
    assert len(explained) == len(steps) == 6
    assert explained[-1] > 50 > explained[0]
    assert last.startswith("Sizes(predictor_params=")
    saved = torch.load("reconstructed.pt", weights_only=True)
    Original("digits_resnet8").net.load_state_dict(saved)
