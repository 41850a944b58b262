"""No compiled function of the CPU reads or writes beside a buffer, whatever the state's indices are.

numba asks at every access where NUMBA_BOUNDSCHECK is 1; `nothing_beside_a_buffer` (tests/conftest.py) then fails the test of a
kernel that was given up. Without it these tests show no more than that the process lives.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.hostile.conftest import Record
from tests.optim.helpers import started, train
from tests.reference import names

ROOT = Path(__file__).parents[2]
CHECKED = os.environ.get("NUMBA_BOUNDSCHECK") == "1"
# All that steps with kernels on tampered states, in faults, and beside plain torch.
FILES = (
    "tests/hostile/test_bounds.py",
    "tests/hostile/test_states.py",
    "tests/hostile/test_cut_short.py",
    "tests/kernels/test_sparse.py",
    "tests/kernels/test_low_rank.py",
    "tests/kernels/test_metric.py",
    "tests/optim/test_many_shapes.py",
    "tests/optim/test_microadam.py",
)
ITSELF = "tests/hostile/test_bounds.py::test_with_every_access_checked"
SHAPES = ((12, 30), (12, 30), (9, 11), (1, 1500))
INT16 = torch.iinfo(torch.int16)


@pytest.mark.parametrize("options", [{}, {"window_format": "low_bit"}], ids=["plain", "codes"])
@pytest.mark.parametrize("name", names(compression="sparse"))
def test_indices_that_nobody_checked(name, options):
    """Written into the running state: loading would refuse them."""
    pytest.importorskip("numba")
    record = Record("indices in the running state")
    for bad in (-1, 1023, INT16.min, INT16.max):
        optimizer, params = started(name, shapes=SHAPES, density=0.2, **options)
        entries = [t for p in params for t in optimizer.state[p].values() if t.dtype == torch.int16]
        assert entries
        for t in entries:
            t.fill_(bad)
        train(optimizer, params, 6, 8)
        record.add(f"{name} {options}: {bad}", "survived")
    record.check(4)


def test_what_is_beside_a_row_gives_no_more_than_flags():
    """Memory there is anything: more than a bit of it in a flag would count numbers that there are not, beyond their array."""
    cpu_sparse = pytest.importorskip("hf_efcp.kernels.cpu_sparse")
    marks = np.full(30 + 2 * cpu_sparse.ROOM, 255, np.uint8)
    marks[cpu_sparse.ROOM : cpu_sparse.ROOM + 30] = 0
    flags, new = np.zeros(64, np.uint8), np.arange(20, dtype=np.int16)
    places = np.full(64, cpu_sparse.ROOM, np.int32)
    cpu_sparse._flag(np.full(64, 1023, np.int16), np.int32(0), new, places, marks, flags)
    assert flags.max() <= 1


@pytest.mark.skipif(not CHECKED, reason="asks what NUMBA_BOUNDSCHECK=1 does")
def test_an_access_beside_a_buffer_is_noticed():
    from hf_efcp.kernels.cpu_tools import compiled

    @compiled(relaxed={"reassoc"})
    def third(x):
        return x[2]

    with pytest.raises(IndexError):
        third(torch.zeros(2).numpy())


@pytest.mark.slow
def test_with_every_access_checked(tmp_path):
    pytest.importorskip("numba")
    environment = {**os.environ, "NUMBA_BOUNDSCHECK": "1", "NUMBA_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-m", "not gpu", "--deselect", ITSELF, *FILES]
    found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout[-5000:]
