"""Files, folders and options that commands take: in unusual forms, or together."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from nernlit.cli.main import main
from nernlit.cli.runs import Run
from nernlit.cli.sweep_plan import Sweep
from nernlit.cli.sweep_results import comparable
from nernlit.coding.kept import Kept
from nernlit.errors import StorageError, UsageError
from nernlit.originals import Original
from nernlit.predictors import MLP, Table
from nernlit.representation import Representation, load_representation
from nernlit.storage.container import read_container
from nernlit.storage.files import write_atomically
from tests.fakes import QUICK

DIGITS = ["--data", "DigitsDataModule"]
COMPRESS = ["compress", "-o", "small.nern", *DIGITS, "--threads=1", "--epochs=1", "--data.batch_size=500"]


def _table(size: int = 3, **options: object) -> Representation:
    original = Original("digits_resnet8", pretrained=True)
    return Representation(original, Table(size), order="none", **options)  # type: ignore[arg-type]


def _refused(args: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as error:
        main(args)
    assert error.value.code == 2
    return capsys.readouterr().err


def test_a_folded_file_has_the_parameters_of_its_original() -> None:
    representation = _table()
    original = representation.original
    save_file(original.net.state_dict(), "original.safetensors")
    representation.save("folded.nern", fold_batch_norm=True)
    loaded, _ = load_representation("folded.nern", original="original.safetensors")
    for key, value in loaded.entries().items():
        assert torch.allclose(value, original.net.state_dict()[key], rtol=1e-4, atol=1e-5), key
    images = torch.rand(4, 1, 8, 8)
    assert torch.allclose(loaded(images), original(images), atol=1e-3)


def test_results_of_an_edited_configuration_are_not_mixed_with_earlier_ones(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path, "best", ())
    row = {"config": "mine", "asked_hidden": 0, "hidden": "", "select": "best", "settings": ""}
    rows: list[dict[str, float | str]] = [
        {**row, "seed": 0, "files": "old"},
        {**row, "seed": 1, "files": "old"},
        {**row, "seed": 0, "files": "new"},
    ]
    assert comparable(rows, sweep) == [rows[2]]


def test_sizes_of_a_file_are_its_own() -> None:
    representation = _table()
    representation.save("net.nern", "int8", fold_batch_norm=True)
    assert Run.open("net.nern").sizes().file_bytes == Path("net.nern").stat().st_size


@pytest.mark.parametrize(("size", "layers"), [(3, "all_convs"), (7, "all_convs"), (7, "all")])
def test_numbers_of_a_table_outside_of_crops_are_no_parameters(size: int, layers: str) -> None:
    representation = _table(size, layers=layers, pointwise="tile")
    assert representation.sizes().predictor_params == pytest.approx(representation.layout.num_weights, rel=0.01)


@pytest.mark.parametrize("name", ["steps", "integers"])
def test_tensors_with_names_that_files_use_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match=f"the network has a tensor '{name}' of its own"):
        Kept.from_tensors({name: torch.randn(5)})


def test_a_pipe_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(StorageError, match="it is a device or a pipe; expected a file"):
        write_atomically(pipe, b"content")
    assert pipe.is_fifo()


def test_a_search_for_the_smallest_file_takes_options_of_the_representation() -> None:
    options = ["--target_drop=90", "--model.representation.quantize.step_rate=0.5"]
    main([*COMPRESS, *options, "--trainer.limit_train_batches=1", "digits_resnet8"])
    assert Path("small.nern").is_file()


def test_the_form_of_kept_tensors_is_that_of_the_rate() -> None:
    main([*COMPRESS, "digits_resnet8", "--model.rate.kept=fp32", "--trainer.limit_train_batches=1"])
    assert read_container(Path("small.nern")).header["kept"]["form"] == "fp32"


def test_a_file_of_weights_that_changes_under_its_name_is_compressed_anew() -> None:
    state = Original("digits_resnet8", pretrained=True).net.state_dict()
    command = [*COMPRESS, "net.safetensors", "--network=digits_resnet8", "--trainer.limit_train_batches=1"]
    save_file(state, "net.safetensors")
    main(command)
    save_file(
        {key: value * 1.01 if key == "conv1.weight" else value for key, value in state.items()}, "net.safetensors"
    )
    main(command)
    assert len(list(Path("runs").glob("small-*"))) == 2


@pytest.mark.parametrize(
    "option", ["--trainer.logger=null", "--trainer.logger.name=mine", "--trainer.logger.version=1"]
)
def test_the_folders_of_fits_cannot_be_set(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    shown = _refused([*COMPRESS, "digits_resnet8", option], capsys)
    assert f"{option}: this command sets {option.partition('=')[0]}; it chooses the folders of its fits" in shown


def test_options_of_no_logger_are_one_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert "error: " in _refused(["fit", *QUICK, "--trainer.logger=null", "--trainer.logger.name=y"], capsys)


def test_options_of_the_fit_may_come_before_the_network() -> None:
    main(["compress", "--trainer.gradient_clip_val", "1", "digits_resnet8", *COMPRESS[1:], "--trainer.max_steps", "1"])
    assert Path("small.nern").is_file()


def test_a_converted_representation_runs_with_trained_kept_tensors() -> None:
    representation = Representation(Original("digits_resnet8", pretrained=True), MLP(8), tune_kept="affine").half()
    assert representation(torch.rand(2, 1, 8, 8)).dtype == torch.float32


def test_the_original_may_be_given_as_the_run_that_trained_it() -> None:
    run = Path("runs/original/version_0/checkpoints")
    run.mkdir(parents=True)
    (run / "best.ckpt").touch()
    _table().save("net.nern")
    assert Run.open("net.nern", original=Path("runs/original")).original == run / "best.ckpt"


def test_printed_paths_are_not_markup(capsys: pytest.CaptureFixture[str]) -> None:
    _table().save("net.nern")
    main(["reconstruct", "net.nern", "-o", "out[v2][/x].safetensors"])
    assert "wrote out[v2][/x].safetensors" in capsys.readouterr().out


def test_a_test_of_a_file_asks_for_its_data(capsys: pytest.CaptureFixture[str]) -> None:
    _table().save("net.nern")
    assert "no dataset is given: pass --data" in _refused(["test", "net.nern"], capsys)
    for args in (["--data=DigitsDataModule", "none.nern"], ["--data", "DigitsDataModule", "none.NERN"]):
        assert f"{args[-1]} is missing" in _refused(["test", *args], capsys)


def test_the_home_folder_may_be_given_as_a_tilde(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    main(["fit", *QUICK, "--trainer.logger.save_dir=~/runs"])
    assert not Path("~").exists()
    (run,) = tmp_path.glob("runs/*/version_0")
    assert (run / "checkpoints/best.ckpt").is_file()
    assert (run / "config.yaml").is_file()
