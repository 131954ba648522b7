import signal
from collections.abc import Iterator

import pytest
import torch
from jsonargparse import set_parsing_settings

from nernlit.callbacks import RepresentationFigures
from nernlit.utilities.signals import SIGNALS

set_parsing_settings(import_path_allowlist=["tests"])  # the tests' own classes are trusted
torch.set_num_threads(1)  # a worker per core; and results repeat to the bit


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs write to ./runs; keep them out of the checkout."""
    monkeypatch.chdir(tmp_path_factory.mktemp("cwd"))


@pytest.fixture(autouse=True)
def _without_figures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only tests marked `figures` draw at the end of a fit: it takes a third of a short fit's time."""
    if request.node.get_closest_marker("figures") is None:
        monkeypatch.setattr(RepresentationFigures, "_draw", lambda *_: None)


@pytest.fixture
def listening() -> Iterator[None]:
    """As in a command's own process, before Lightning handles signals."""
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    SIGNALS.restart()
    SIGNALS.listen()
    yield
    signal.signal(signal.SIGTERM, before[0])
    signal.signal(signal.SIGINT, before[1])
