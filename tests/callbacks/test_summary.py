"""What a fit leaves in TensorBoard about how it was run, and the table at its end."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
from safetensors.torch import save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2

from nernlit.callbacks import Summary
from nernlit.cli.main import main, run
from nernlit.originals import Original
from tests.fakes import QUICK


def _hyperparameters(folder: Path) -> dict[str, Any]:
    """Of TensorBoard's hparams tab."""
    plugin = EventAccumulator(str(folder)).Reload().PluginTagToContent("hparams")["_hparams_/session_start_info"]
    info = plugin_data_pb2.HParamsPluginData.FromString(plugin).session_start_info
    return {name: getattr(value, str(value.WhichOneof("kind"))) for name, value in info.hparams.items()}


def test_tensorboard_compares_seed_data_and_learning_rate(capsys: pytest.CaptureFixture[str]) -> None:
    cli = run(["fit", *QUICK, "--seed_everything=7", "--data.eval_batch_size=33"])
    folder = Path(str(cli.trainer.log_dir))
    found = _hyperparameters(folder)
    assert found["seed"] == 7
    assert found["data.class_path"] == "nernlit.data.DigitsDataModule"
    assert found["data.init_args.eval_batch_size"] == 33
    assert found["data.init_args.train_on"] == "none"
    assert found["representation.predictor.init_args.hidden"] == 8
    rates = EventAccumulator(str(folder)).Reload().Scalars("lr")
    assert [event.step for event in rates] == list(range(10))
    steepest = max(rates, key=lambda event: event.value)
    assert 0 < steepest.value <= 0.02  # the configuration's
    assert rates[0].value < rates[-1].value  # ten steps of a warm-up of a hundred
    parameters = cli.model.representation.sizes().predictor_params
    assert f"predictor parameters {parameters:,} " in " ".join(capsys.readouterr().out.split())


def test_resuming_a_complete_fit_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    main(["fit", *QUICK])
    assert "complete" not in capsys.readouterr().out
    main(["fit", *QUICK, "--ckpt_path=last"])
    assert "The fit is already complete after 10 steps." in capsys.readouterr().out
    main(["fit", *QUICK, "--ckpt_path=last", "--trainer.max_epochs=9", "--trainer.max_time=00:00:00:00"])
    assert "complete" not in capsys.readouterr().out


def test_the_first_process_does_not_wait_for_the_others_at_the_end_of_a_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    def broadcast(*_: object, **__: object) -> None:
        raise AssertionError("the other processes do not take part in this broadcast")

    on_fit_end = Summary.on_fit_end

    def alone(self: Summary, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(trainer.strategy, "broadcast", broadcast)
            on_fit_end(self, trainer, pl_module)

    monkeypatch.setattr(Summary, "on_fit_end", alone)
    cli = run(["fit", *QUICK])
    assert _hyperparameters(Path(str(cli.trainer.log_dir)))["data.class_path"] == "nernlit.data.DigitsDataModule"


def test_the_size_that_a_fit_logs_is_that_of_the_exported_file(capsys: pytest.CaptureFixture[str]) -> None:
    cli = run(["fit", *QUICK])
    folder = Path(str(cli.trainer.log_dir))
    shown = " ".join(capsys.readouterr().out.split())
    events = EventAccumulator(str(folder)).Reload()
    assert not {tag for tag in events.Tags()["scalars"] if "stored" in tag}
    logged = {event.value for event in events.Scalars("size/cr_file")}  # at the fit's start and at its end
    main(["export", str(folder), "-o", "net.nern"])
    save_file(Original("digits_resnet8", pretrained=True).net.state_dict(), "original.safetensors")
    ratio = Path("net.nern").stat().st_size / Path("original.safetensors").stat().st_size
    assert list(logged) == pytest.approx([ratio], rel=1e-6)  # TensorBoard keeps float32
    assert cli.model.representation.sizes().cr_file == ratio
    assert f"CR (.nern file / original's file) {ratio:.1%} " in shown
