import shutil
import warnings
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save, save_file

import nernlit
from nernlit.cli.main import main, run
from nernlit.coding import part_bytes
from nernlit.errors import CheckpointError, UsageError
from nernlit.originals import Original
from nernlit.predictors import Table
from nernlit.representation import Representation, write_onnx
from nernlit.storage.checkpoint import read_checkpoint
from nernlit.storage.container import read_container
from tests.fakes import CONFIGS, NEEDS_ONNX, QUICK, digits_representation


@pytest.fixture
def fitted() -> Path:
    run(["fit", *QUICK])
    return Path("runs/digits_h96/version_0")


def test_a_fit_becomes_a_file_that_needs_neither_original_nor_run(
    fitted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    capsys.readouterr()
    main(["export", str(fitted), "-o", str(tmp_path / "net.nern")])
    shown = capsys.readouterr().out
    size = (tmp_path / "net.nern").stat().st_size
    assert f"{size:,}" in shown
    original = len(save(timm.create_model("digits_resnet8").state_dict()))
    assert f"CR of the file {size / original:.1%}" in shown
    run(["test", *QUICK, "--ckpt_path=best"])
    accuracy = next(line for line in capsys.readouterr().out.splitlines() if "reconstructed accuracy" in line).split()
    shutil.rmtree("runs")
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings(record=True) as warned:
        main(["test", "net.nern", "--data", "DigitsDataModule"])
    assert [str(warning.message) for warning in warned] == []
    tested = next(line for line in capsys.readouterr().out.splitlines() if line.strip().startswith("accuracy")).split()
    assert tested[-1] == accuracy[-1]


def test_a_files_network_loads_into_timm(fitted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["export", str(fitted), "-o", str(tmp_path / "net.nern")])
    main(["reconstruct", str(tmp_path / "net.nern"), "-o", str(tmp_path / "net.safetensors")])
    assert "timm.create_model('digits_resnet8'" in capsys.readouterr().out
    net = timm.create_model("digits_resnet8", checkpoint_path=str(tmp_path / "net.safetensors"))
    expected = nernlit.load(tmp_path / "net.nern").reconstructed()
    assert all(torch.equal(value, expected[key]) for key, value in net.state_dict().items())


def test_inspect_says_what_a_file_holds(fitted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["export", str(fitted), "-o", str(tmp_path / "net.nern"), "--select", "last"])
    capsys.readouterr()
    main(["inspect", str(tmp_path / "net.nern")])
    shown = capsys.readouterr().out
    assert "network: digits_resnet8, 10 classes, 1 channels" in shown
    assert "classes: 0, 1, 2, 3, 4, ..., 9" in shown  # of the data that the run was fitted on
    assert nernlit.load(tmp_path / "net.nern").original.class_names == tuple("0123456789")
    assert "MLP(hidden=8, depth=5, activation=gelu" in shown
    contents = read_container(tmp_path / "net.nern")
    assert f"{sum(v.nbytes for k, v in contents.tensors.items() if k.startswith('predictor.')):,}" in shown


def test_kept_tensors_are_rounded_and_batch_norm_is_folded_on_request(
    fitted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["export", str(fitted), "-o", "exact.nern"])
    main(["export", str(fitted), "-o", "half.nern", "--kept", "fp16", "--fold_batch_norm"])
    capsys.readouterr()
    sizes = []
    for name, facts in (
        ("exact", "stored as fp32, largest relative change 0.0e+00"),
        ("half", "stored as fp16, largest relative change"),
    ):
        main(["inspect", f"{name}.nern"])
        assert f"not predicted: {facts}" in capsys.readouterr().out
        assert (read_container(Path(f"{name}.nern")).header["kept"]["error"] > 0) == (name == "half")
        sizes.append(part_bytes(read_container(Path(f"{name}.nern")))["kept"])
    exact, half = nernlit.load("exact.nern"), nernlit.load("half.nern")
    norms = sum(value.numel() for key, value in exact.original.net.state_dict().items() if "running_" in key)
    assert sizes[1] == (sizes[0] - 4 * norms) / 2
    images = torch.rand(4, 1, 8, 8)
    assert (half(images) - exact(images)).abs().max() < 0.01 * exact(images).abs().max()
    for options in (["--kept", "bf16"], ["--fold_batch_norm"]):
        with pytest.raises(SystemExit) as caught:
            main(["export", str(fitted), "-o", "net.onnx", *options])
        assert caught.value.code == 2
        assert f"{' '.join(options)} is for .nern files; leave it out." in capsys.readouterr().err


def test_a_network_without_batch_norm_has_nothing_to_fold(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = {"img_size": 8, "patch_size": 2, "depth": 1}
    original = Original("test_vit", num_classes=4, in_chans=1, mean=[0.5], std=[0.5], arguments=arguments)
    Representation(original, Table(4), layers="all", order="none").save("vit.nern")
    with pytest.raises(SystemExit):
        main(["export", "vit.nern", "-o", "folded.nern", "--fold_batch_norm"])
    assert "--fold_batch_norm: the network has no BatchNorm layers; leave it out" in capsys.readouterr().err
    main(["export", "vit.nern", "-o", "same.nern", "--no-fold_batch_norm"])
    assert not Path("folded.nern").exists()


def test_a_fit_goes_on_from_a_file_and_its_checkpoints_need_that_file_alone(
    fitted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["export", str(fitted), "-o", "first.nern"])
    shutil.rmtree("runs")
    distill = ["-c", str(CONFIGS / "digits_h96_decoupled.yaml"), QUICK[2], *QUICK[4:]]
    distill = [option for option in distill if "representation" not in option]
    distill += [
        "--model.representation=null",
        "--model.reconstruction.steps=0",
        "--trainer.logger.init_args.name=from_file",
    ]
    with pytest.raises(UsageError, match=r"so the student would be its own teacher; pass --model\.teacher"):
        run(["fit", *distill, "--model.init_from=first.nern", "--trainer.max_epochs=1"])
    distill.append("--model.cross_entropy_weight=1.0")
    first = run(["fit", *distill, "--model.init_from=first.nern", "--trainer.max_epochs=1"]).model
    stored = nernlit.load("first.nern")
    assert first.representation.original.fingerprint() == stored.original.fingerprint()
    last = Path("runs/from_file/version_0/checkpoints/last.ckpt")
    assert read_checkpoint(last)["hyper_parameters"]["init_from"] == str(Path("first.nern").absolute())
    resumed = run(["fit", *distill, "--ckpt_path=last"])
    assert resumed.trainer.global_step == 20  # two epochs of ten
    assert resumed.model.representation.scale == stored.scale
    run(["test", *distill, "--ckpt_path=best"])
    main(["export", "runs/from_file", "-o", "second.nern", "--select", "last"])
    second = nernlit.load("second.nern")
    assert torch.allclose(second.layout.vector(second.weights()), _weights_of(resumed.model.representation), atol=1e-6)
    assert not torch.equal(second.layout.vector(second.weights()), _weights_of(stored))
    stored_tensors = [read_container(Path(name)).tensors for name in ("first.nern", "second.nern")]
    assert torch.equal(stored_tensors[1]["checks.original"], stored_tensors[0]["checks.reconstructed"])
    moved = Path("first.nern").rename("moved.nern")
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["export", "runs/from_file", "-o", "third.nern"])
    assert "was fitted with" in (shown := capsys.readouterr().err)
    assert "first.nern, which does not exist" in shown
    main(["export", "runs/from_file", "-o", "third.nern", "--select", "last", "--original", "moved.nern"])
    assert Path("third.nern").read_bytes() == Path("second.nern").read_bytes()
    moved_run = run(["test", *distill, "--ckpt_path=best", f"--model.init_from={moved}"])
    assert moved_run.model.representation.original.weights_from == str(moved.absolute())
    with pytest.raises(
        CheckpointError, match=r"first\.nern, which does not exist any more; pass its new path: --model.init_from FILE"
    ):
        run(["test", *distill, "--ckpt_path=best"])


def _weights_of(representation: nernlit.Representation) -> torch.Tensor:
    return representation.layout.vector(representation.weights()).detach()


def test_a_fit_with_its_own_representation_needs_the_file_at_its_start_only(fitted: Path) -> None:
    main(["export", str(fitted), "-o", "start.nern"])
    distill = ["-c", str(CONFIGS / "digits_h96_decoupled.yaml"), QUICK[2], *QUICK[4:], "--model.reconstruction.steps=0"]
    run(["fit", *distill, "--model.init_from=start.nern", "--trainer.max_epochs=1"])
    Path("start.nern").unlink()
    resumed = run(["fit", *distill, "--ckpt_path=last"]).model
    assert resumed.representation.original.weights_from == "timm's pretrained weights"
    main(["export", "runs/digits_h96_decoupled", "-o", "end.nern", "--select", "last"])
    assert torch.allclose(_weights_of(nernlit.load("end.nern")), _weights_of(resumed.representation), atol=1e-6)


def test_a_module_is_loaded_from_a_checkpoint_without_a_trainer(fitted: Path) -> None:
    file = fitted / "checkpoints" / "last.ckpt"
    loaded = nernlit.ReconOnly.load_from_checkpoint(file)
    assert torch.equal(_weights_of(loaded.representation), _weights_of(nernlit.load(file)))


def test_a_file_is_an_originals_checkpoint(fitted: Path) -> None:
    main(["export", str(fitted), "-o", "net.nern"])
    of_file = ["--model.representation.original.pretrained=false"]
    of_file += ["--model.representation.original.checkpoint=net.nern"]
    run(["fit", *QUICK, *of_file, "--trainer.logger.init_args.name=again"])
    original = nernlit.load(next(Path("runs/again").glob("*/checkpoints/best.ckpt"))).original
    assert original.weights_from == str(Path("net.nern").absolute())
    for key, value in nernlit.load("net.nern").reconstructed().items():
        assert torch.equal(original.net.state_dict()[key], value)


def test_a_file_that_is_written_from_a_file_keeps_the_original_that_is_passed(fitted: Path) -> None:
    main(["export", str(fitted), "-o", "first.nern"])
    save_file(Original("digits_resnet8", pretrained=True).net.state_dict(), "original.safetensors")
    main(["export", "first.nern", "-o", "again.nern", "--original", "original.safetensors"])
    assert Path("again.nern").read_bytes() == Path("first.nern").read_bytes()


def test_an_onnx_model_needs_a_recent_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.7.1")
    with pytest.raises(UsageError, match=r"writing ONNX needs torch 2\.8 or later, and this is torch 2\.7\.1\."):
        write_onnx(digits_representation(), tmp_path / "net.onnx")
    assert not list(tmp_path.iterdir())


@NEEDS_ONNX
def test_a_file_becomes_an_onnx_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    digits_representation().save(tmp_path / "net.nern")
    main(["export", str(tmp_path / "net.nern"), "-o", str(tmp_path / "net.onnx")])
    shown = capsys.readouterr().out
    assert shown.startswith(f"wrote {tmp_path / 'net.onnx'} ({(tmp_path / 'net.onnx').stat().st_size:,} bytes)")
    assert "the model normalizes them" in shown


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["export", "nowhere", "-o", "a.nern"], "nowhere is not a run"),
        (["inspect", "nowhere.nern"], "nowhere.nern is missing"),
        (["reconstruct", "nowhere.nern", "-o", "a.pt"], "expected a file name that ends in .safetensors"),
        (["test", "nowhere.nern", "--data", "DigitsDataModule"], "nowhere.nern is missing"),
        (["export", "nowhere", "-o", "a.pt"], "--out a.pt: expected a file name that ends in .nern or .onnx"),
        (["export", "nowhere", "-o", "a.nern", "--image_size", "8"], "--image_size 8 is for .onnx files"),
        (["export", "nowhere", "-o", "a.nern", "--integers"], "--integers is for .onnx files; leave it out"),
        (["export", "a.nern", "-o", "b.nern", "--select", "last"], "--select last: a.nern holds one representation"),
        (["test", "nowhere.nern", "--data", "NoImages"], "--data has no images"),
        (["test", "nowhere.nern", "--data", "null"], "--data has no images"),
    ],
)
def test_what_cannot_be_done_is_one_line(args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(args)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
