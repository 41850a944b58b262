"""Who waits for the compiler is told, once."""

import logging
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

pytest.importorskip("numba")
from numba.core.event import Event, EventStatus

from hf_efcp.kernels.cpu_compiling import Announcement


def event(module):
    function = SimpleNamespace(__module__=module)
    return Event("numba:compile", EventStatus.START, data={"dispatcher": SimpleNamespace(py_func=function)})


@pytest.mark.parametrize("kept, end", [(True, "they are kept on disk for later runs"), (False, "set NUMBA_CACHE_DIR")])
def test_it_is_said_once_and_for_our_functions(kept, end, caplog, monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    caplog.set_level(logging.WARNING, "hf_efcp.compiling")
    announcement = Announcement()
    announcement.kept = kept
    for module in ("umap.layouts", "hf_efcp.kernels.cpu_sparse", "hf_efcp.kernels.cpu_keep"):
        announcement.notify(event(module))
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and record.name == "hf_efcp.compiling" and end in record.message


def test_other_processes_of_a_machine_are_silent(caplog, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    caplog.set_level(logging.WARNING, "hf_efcp.compiling")
    Announcement().notify(event("hf_efcp.kernels.cpu_sparse"))
    assert not caplog.records


def test_the_second_process_is_silent(tmp_path):
    program = (
        "import torch; from hf_efcp.kernels import cpu_tools; import numpy as np\n"
        "cpu_tools.bounds(np.zeros((1, 2), np.uint16), 0, np.zeros(1, np.float32))"
    )
    env = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", program]
    said = [subprocess.run(command, env=env, capture_output=True, text=True, check=True).stderr for _ in range(2)]
    assert [text.count("compiling CPU kernels") for text in said] == [1, 0]
