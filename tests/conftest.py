import pytest
import torch

torch.set_num_threads(1)  # a worker per core; and results repeat to the bit


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs write to ./runs; keep them out of the checkout."""
    monkeypatch.chdir(tmp_path_factory.mktemp("cwd"))
