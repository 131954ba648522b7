from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nernlit.cli.main import run
from tests.fakes import QUICK


@pytest.mark.figures
def test_figures_are_drawn_at_every_nth_validation_and_at_the_end() -> None:
    cli = run(["fit", *QUICK, "--trainer.max_epochs=3", "--figures.every_n_validations=2"])
    events = EventAccumulator(str(Path(cli.trainer.log_dir))).Reload()
    assert [event.step for event in events.Images("layers/error")] == [10, 15]


@pytest.mark.figures
def test_a_resumed_fit_counts_its_validations_on() -> None:
    run(["fit", *QUICK, "--trainer.max_epochs=1", "--figures.every_n_validations=2"])
    options = ["--trainer.max_epochs=3", "--figures.every_n_validations=2", "--ckpt_path=last"]
    cli = run(["fit", *QUICK, *options])
    events = EventAccumulator(str(Path(cli.trainer.log_dir))).Reload()
    assert [event.step for event in events.Images("layers/error")][-2:] == [10, 15]
