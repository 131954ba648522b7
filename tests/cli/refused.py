"""Commands that must be refused."""

import pytest

from nernlit.cli.main import main


def refused(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """The message of a command that must end with exit code 2 and no traceback."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(args)
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return message
