"""Bad inputs of every kind of file: one message, exit code 2, nothing written, no code run."""

import re
import shutil
from pathlib import Path

import pytest

from nernlit.cli.main import main
from tests.hostile import BAD_INPUTS
from tests.hostile_files import write_good_files


@pytest.fixture(scope="module")
def good_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    write_good_files(folder)
    return folder


def _listed() -> list[str]:
    return sorted(str(path) for path in Path().rglob("*"))


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_bad_input_is_one_message_and_exit_code_2(
    name: str, good_files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command, files, message = BAD_INPUTS[name]
    shutil.copytree(good_files, ".", dirs_exist_ok=True)
    for file, content in files.items():
        path = Path(file)
        path.parent.mkdir(parents=True, exist_ok=True)
        if callable(content):
            content(path)
        else:
            path.write_bytes(content.encode() if isinstance(content, str) else content)
    before = _listed()
    with pytest.raises(SystemExit) as ended:
        main(command.split())
    assert ended.value.code == 2
    # Without the progress of what takes seconds on a busy machine.
    (said,) = [line for line in capsys.readouterr().err.splitlines() if not re.search(r"\.\.\.$|^images: ", line)]
    assert said.startswith("nernlit: error: ")
    assert message in said
    assert _listed() == before  # neither results, nor halves of files, nor what the code in a file would touch


@pytest.mark.parametrize(
    "command",
    [
        "inspect good.nern",
        "reconstruct good.nern -o out.safetensors",
        "export good.ckpt -o out.nern",
        "analyze rounds run --out out",
        "test good.nern --data FolderDataModule --data.root images --data.image_size 8",
    ],
)
def test_the_commands_accept_the_good_files(command: str, good_files: Path) -> None:
    shutil.copytree(good_files, ".", dirs_exist_ok=True)
    main(command.split())
