"""The shipped configurations by name: found from any folder, listed, copied, and installed with the package."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

from nernlit.cli.configs import config_parts, expand_bases, find_config
from nernlit.cli.main import main, run
from nernlit.cli.shipped import listing
from nernlit.errors import UsageError
from tests.fakes import CONFIGS, QUICK

ROOT = CONFIGS.parent


def _files(*args: str) -> list[Path]:
    return [part.file.resolve() for part in config_parts(expand_bases(["fit", *args]))]


def test_a_shipped_configuration_is_found_by_its_name_and_a_file_of_that_name_comes_first() -> None:
    assert _files("-c", "cifar100_h680") == _files("-c", str(CONFIGS / "cifar100_h680.yaml"))
    Path("cifar100_h680").mkdir()  # such as the folder of a run: no configuration
    assert _files("-ccifar100_h680")[-1] == CONFIGS / "cifar100_h680.yaml"
    Path("cifar10_h180").write_text("trainer: {max_epochs: 1}\n")
    assert _files("--config=cifar10_h180") == [Path("cifar10_h180").resolve()]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cifar100_h68", r"no configuration file cifar100_h68 \(did you mean cifar100_h680 or "),
        ("configs/digits_h69.yaml", r"no configuration file configs/digits_h69\.yaml \(did you mean digits_h96"),
        ("zzz", r"no configuration file zzz; `nernlit configs` lists the shipped ones\."),
        ("mine", r"no configuration file mine \(did you mean mine\.yaml\?\); `nernlit configs` lists"),
    ],
)
def test_an_unknown_name_gives_the_close_ones(name: str, message: str) -> None:
    Path("mine.yaml").write_text("base: [digits_h96]\n")
    with pytest.raises(UsageError, match=message):
        expand_bases(["fit", "-c", name])


def test_a_file_of_ones_own_builds_on_shipped_ones_by_name() -> None:
    Path("mine.yaml").write_text("base: [recon_only, cifar10]\nwith: {recon_only: {trainer: {max_epochs: 3}}}\n")
    assert [str(part).rpartition("/")[2] for part in config_parts(expand_bases(["-c", "mine.yaml"]))] == [
        *("trainer.yaml", "recon_only.yaml", "representation.yaml", "cifar10.yaml"),
        *("mine.yaml", "mine.yaml::with::recon_only"),
    ]
    Path("wider.yaml").write_text("base: [cifar10_h180]\n")
    assert _files("-c", "wider.yaml")[-2] == CONFIGS / "cifar10_h180.yaml"


def test_no_two_shipped_files_have_the_same_name() -> None:
    files = list(CONFIGS.rglob("*.yaml"))
    assert {find_config(file.stem).resolve() for file in files} == set(files)


def test_a_fit_by_name_is_the_fit_of_its_file() -> None:
    cli = run(["fit", "-c", "digits_h96", *QUICK[2:]])
    assert type(cli.model).__name__ == "ReconOnly"
    assert Path("runs/digits_h96/version_0/config.yaml").is_file()


def test_the_list_says_what_every_configuration_is_in_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    main(["configs"])
    shown = capsys.readouterr().out
    assert shown.splitlines() == listing()
    assert max(map(len, listing())) <= 80
    assert re.search(r"^CIFAR-100 ResNet56$", shown, re.MULTILINE)
    assert re.search(r"^  cifar100_h680 +width 680, Progressive\.$", shown, re.MULTILINE)
    names = re.findall(r"^  (\w+)", shown, re.MULTILINE)
    assert sorted(names) == sorted(file.stem for file in CONFIGS.rglob("*.yaml"))
    assert names.index("imagenet_h700") < names.index("imagenet_h1024")


def test_a_copy_is_written_once_with_the_comment_of_its_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    main(["configs", "copy", "digits_h96"])
    assert capsys.readouterr().out == "written: digits_h96.yaml (run it with: nernlit fit -c digits_h96.yaml)\n"
    text = Path("digits_h96.yaml").read_text(encoding="utf-8")
    assert text.startswith(
        "# Digits, hidden width 96 (CR 70%), Recon-only.\n# Written by `nernlit configs copy digits_h96`"
    )
    assert yaml.safe_load(text)["model"]["init_args"]["representation"]["predictor"]["init_args"]["hidden"] == 96
    Path("digits_h96.yaml").write_text("mine")
    with pytest.raises(SystemExit):
        main(["configs", "copy", "digits_h96"])
    assert "digits_h96.yaml exists; pass -o FILE for another place" in capsys.readouterr().err
    assert Path("digits_h96.yaml").read_text() == "mine"
    main(["configs", "copy", "digits_h96", "-o", "other/mine.yaml"])
    assert Path("other/mine.yaml").read_text(encoding="utf-8") == text


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["copy", "digits_h69"], "there is no shipped configuration 'digits_h69' (did you mean digits_h96"),
        (
            ["copy", "robustness"],
            "'robustness' is a base file and cannot be run alone; use it in a configuration of your own: `base: [rob",
        ),
        (["copy"], "the following arguments are required: NAME; `nernlit configs copy --help` lists the options"),
        (["list"], "unrecognized arguments: list; `nernlit configs --help` lists the options"),
    ],
)
def test_a_mistake_is_refused_by_name(args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["configs", *args])
    assert message in capsys.readouterr().err
    assert not list(Path().iterdir())


def test_the_package_is_installed_whole_and_with_its_configurations() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    found = {".".join(file.parent.relative_to(ROOT).parts) for file in (ROOT / "nernlit").rglob("__init__.py")}
    assert set(setuptools["packages"]) == found | {"nernlit.configs"}
    assert setuptools["package-dir"] == {"nernlit.configs": "configs"}
    patterns = setuptools["package-data"]["nernlit.configs"]
    assert {file for pattern in patterns for file in CONFIGS.glob(pattern)} == set(CONFIGS.rglob("*.yaml"))
