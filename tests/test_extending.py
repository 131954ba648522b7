"""The files that docs/extending.md and README.md show run as they are."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nernlit.cli.main import main, run
from tests.fakes import CONFIGS, QUICK

DOCS = CONFIGS.parent / "docs"
FILES = {
    name: f"{body}\n"
    for body in re.findall(r"```(?:python|yaml)\n(.*?)\n```", (DOCS / "extending.md").read_text(encoding="utf-8"), re.S)
    for name in re.findall(r"\A# (\w+\.(?:py|yaml))$", body, re.M)
}


@pytest.fixture(autouse=True)
def _in_one_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, content in FILES.items():
        Path(name).write_text(content, encoding="utf-8")
    monkeypatch.syspath_prepend(str(Path.cwd()))
    for name in FILES:
        monkeypatch.delitem(sys.modules, Path(name).stem, raising=False)


def test_every_file_of_the_page_is_found() -> None:
    scripts = {"own_network.py", "sums.py", "stripes.py", "inverted.py", "largest.py", "absolute.py"}
    assert set(FILES) == scripts | {"digits_sums.yaml", "stripes_original.yaml", "digits_absolute.yaml"}


def test_a_network_in_memory_is_fitted() -> None:
    space = runpy.run_path("own_network.py")
    saved = torch.load("reconstructed.pt", weights_only=True)
    assert saved.keys() == space["net"].state_dict().keys()
    assert not torch.equal(saved["2.weight"], space["net"].state_dict()["2.weight"])


@pytest.mark.parametrize("config", [name for name in FILES if name.endswith(".yaml")])
def test_a_configuration_of_ones_own_classes_is_fitted_and_tested(config: str) -> None:
    fitted = run(["fit", "-c", config, "--trainer.max_epochs=1", "--trainer.check_val_every_n_epoch=1"])
    assert torch.isfinite(fitted.trainer.callback_metrics["train/loss"])
    tested = run(["test", "-c", config, "--ckpt_path=best"])
    assert 0 <= float(tested.trainer.callback_metrics["test/acc"]) <= 1


def test_a_test_set_and_a_sampling_of_ones_own_are_named_in_yaml() -> None:
    run(["fit", *QUICK, "--model.sampling=largest.Largest"])
    more = ["--model.sampling=largest.Largest", "--data.eval_sets=[{class_path: inverted.Inverted}]"]
    tested = run(["test", *QUICK, *more, "--ckpt_path=best"])
    assert "test/acc_inverted_all" in tested.trainer.callback_metrics


def test_a_module_that_registers_a_network_is_imported_by_its_option(capsys: pytest.CaptureFixture[str]) -> None:
    Path("registering.py").write_text(
        "from timm.models import register_model\n"
        "from torch import nn\n"
        "@register_model\n"
        "def registered_for_a_test(pretrained=False, num_classes=10, in_chans=1, **options):\n"
        "    return nn.Sequential(nn.Conv2d(in_chans, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, num_classes))\n"
    )
    original = "{name: registered_for_a_test, num_classes: 10, in_chans: 1, mean: [0.5], std: [0.5]}"
    fit = ["fit", "-c", "digits_original", "--model.original", original, "--trainer.max_epochs=1"]
    for option, message in (
        ([], "If a module of yours registers it, import the module (on the command line: --import MODULE)."),
        (["--import", "registering", "--model.original.num_classes=null"], "does not state its num_classes; pass"),
        (["--import", "no_such_module"], "--import no_such_module: there is no module 'no_such_module'."),
        (["--import", "pytest"], "--import pytest: pytest is refused, since importing it would run its code"),
        (["--import"], "--import needs a value."),
    ):
        with pytest.raises(SystemExit):
            main([*fit, *option])
        assert message in capsys.readouterr().err
    main([*fit, "--import", "registering"])
    assert list(Path().rglob("best.ckpt"))


def test_what_predict_prints_works_in_a_new_python(capsys: pytest.CaptureFixture[str]) -> None:
    run(["fit", *QUICK])
    main(["predict", *QUICK, "--ckpt_path=best"])
    shown = capsys.readouterr().out
    code = shown[shown.index("import timm") :].splitlines()[:2]
    Path("pasted.py").write_text("\n".join([*code, "print(type(net).__name__, net.linear.out_features)"]) + "\n")
    done = subprocess.run(
        [sys.executable, Path("pasted.py").absolute()],
        capture_output=True,
        text=True,
        cwd="/",
        env={"PYTHONPATH": str(CONFIGS.parent)},
    )
    assert done.stdout == "CifarResNet 10\n", done.stderr
    assert "normalized with mean" in shown
