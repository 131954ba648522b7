from pathlib import Path
from typing import Any

import pytest
from jsonargparse import ArgumentParser

from nernlit.data import ImageDataModule
from nernlit.utilities.trust import is_installed, is_refused, known_names_only, refusal, refused_name, trusting

OURS = "from nernlit.data import DigitsDataModule\n\n\nclass Ours(DigitsDataModule):\n    pass\n"


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An installed module that leaves a file when it is imported; not in the working directory."""
    (tmp_path / "installed_elsewhere.py").write_text(f"open('imported', 'w').close()\n{OURS}")
    monkeypatch.syspath_prepend(tmp_path)
    return "installed_elsewhere.Ours"


def _parsed(class_path: str) -> Any:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(ImageDataModule, "data")
    return parser.parse_args([f"--data={class_path}"]).data.class_path


def _refused(class_path: str) -> str | None:
    with known_names_only(), pytest.raises(Exception, match="is not allowed") as caught:
        _parsed(class_path)
    return refused_name(str(caught.value))


def test_a_module_elsewhere_is_refused_before_it_is_imported(elsewhere: str) -> None:
    assert _refused(elsewhere) == elsewhere
    assert not Path("imported").exists()


def test_a_trusted_module_is_imported(elsewhere: str) -> None:
    with trusting(), known_names_only():
        assert _parsed(elsewhere) == elsewhere
    assert Path("imported").exists()


def test_a_class_that_is_named_to_the_policy_is_imported(elsewhere: str) -> None:
    with known_names_only([elsewhere]):
        assert _parsed(elsewhere) == elsewhere


@pytest.mark.parametrize("place", ["own_{}.py", "own_{}/__init__.py", "own_{}/inner.py"])
def test_modules_of_the_working_directory_are_imported(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path(place.format(len(place)))  # no two tests import a module of the same name
    path.parent.mkdir(exist_ok=True)
    path.write_text(OURS)
    monkeypatch.syspath_prepend(Path.cwd())
    class_path = f"{'.'.join(path.with_suffix('').parts)}.Ours".replace(".__init__", "")
    with known_names_only():
        assert _parsed(class_path) == class_path


@pytest.mark.parametrize("name", ["time", "logging", "jsonargparse"])
def test_a_file_in_the_working_directory_does_not_allow_an_installed_module_of_its_name(name: str) -> None:
    Path(f"{name}.py").touch()
    with known_names_only():
        assert is_refused(f"{name}.anything")


def test_code_that_a_known_package_imports_is_refused_under_its_own_name() -> None:
    assert _refused("torch.os.system") == "posix.system"
    assert _refused("torch.utils.data.dataloader.logging.FileHandler") == "logging.FileHandler"


def test_a_module_that_is_not_installed_is_no_question_of_trust() -> None:
    assert _refused("no_such_module.Class") == "no_such_module.Class"
    assert not is_installed("no_such_module.Class")
    assert refusal("no_such_module.Class") == "there is no module 'no_such_module'."
    with known_names_only():
        assert not is_refused("no_such_module.Class")


def test_the_restriction_ends_with_its_block(elsewhere: str) -> None:
    with known_names_only():
        assert is_refused(elsewhere)
    assert not is_refused(elsewhere)
    assert _parsed(elsewhere) == elsewhere
