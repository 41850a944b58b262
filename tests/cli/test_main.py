"""What `hf-efcp` says without a command's help."""

import platform

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
