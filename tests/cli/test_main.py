"""What `hf-efcp` says without a command's help."""

import platform
import subprocess
import sys

import pytest
import torch

from hf_efcp import __version__
from hf_efcp.cli.main import main


def test_the_version_is_one_line(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"hf_efcp {__version__}, torch {torch.__version__.partition('+')[0]}")
    assert line.endswith(f"Python {platform.python_version()}")


def test_a_pipe_that_closes_early_is_no_error():
    """As in `hf-efcp list --options | head -1`."""
    command = [sys.executable, "-m", "hf_efcp.cli.main", "list", "--options"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait() == 0


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["estimat", "minilm"], "unknown command 'estimat': did you mean 'estimate'? valid: run, enable, "),
        (["zzz"], "unknown command 'zzz': valid: run, enable, "),
        (["advise", "minilm", "--gup", "24GiB"], "unknown option '--gup' for hf-efcp advise: did you mean '--gpu'? valid: --"),
        (["list", "--optons=x"], "unknown option '--optons' for hf-efcp list: did you mean '--options'? valid: --"),
        (["list", "a", "b"], "unrecognized arguments: b"),
    ],
)
def test_a_misspelt_word_has_the_nearest_one(argv, said, capsys):
    with pytest.raises(SystemExit) as ended:
        main(argv)
    assert ended.value.code == 2
    assert f"error: {said}" in capsys.readouterr().err
