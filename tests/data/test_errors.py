"""How the commands end: 2 for a mistake, 1 for what a retry may cure, and one line that says what."""

import subprocess
import sys

import pytest

from data import DataError
from data.errors import WorkError, end


@pytest.mark.parametrize(
    ("error", "code"), [(DataError("no such split"), 2), (WorkError("disk full"), 1), (OSError("gone"), 1)]
)
def test_a_command_ends_with_the_code_of_its_error(error, code, capsys):
    with pytest.raises(SystemExit, match=str(error)) as ended:
        end(error)
    assert ended.value.code == code and capsys.readouterr().err == f"error: {error}\n"


def test_a_dataset_that_is_not_there_is_a_mistake(tmp_path):
    done = subprocess.run([sys.executable, "-m", "data.inspect", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and done.stderr.startswith("error: ")
