"""The Triton kernels compile for GPUs that are not there, and fit; compile_kernels.py is run without Triton's interpreter."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# As the script prints it.
LINE = re.compile(r"^sm_(\d+) (\w+)\((.*)\): registers (\d+), spills (\d+), shared (\d+), warps (\d+)$", re.MULTILINE)


def compiled(*words):
    """Run the script; give its status, what it found as (target, kernel), and what it said."""
    triton = importlib.util.find_spec("triton")
    if triton is None or not (Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump").exists():
        pytest.skip("needs Triton and its tools for NVIDIA GPUs")
    script = [sys.executable, str(ROOT / "tests/kernels/compile_kernels.py"), *map(str, words)]
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(script, capture_output=True, text=True, env=env, cwd=ROOT)
    lines = LINE.findall(done.stdout)
    assert all(0 < int(registers) < 256 and 1 <= int(warps) <= 32 for *_, registers, _, _, warps in lines)
    return done.returncode, {(int(target), kernel) for target, kernel, *_ in lines}, done.stdout + done.stderr


def test_every_kernel_compiles_for_hopper_and_fits():
    status, found, said = compiled("--few", 90)
    assert status == 0, said
    assert found


@pytest.mark.slow
def test_every_kernel_compiles_in_every_format_for_turing_ampere_and_hopper_and_fits():
    status, found, said = compiled(75, 80, 90)
    assert status == 0, said
    kernels = {target: {kernel for other, kernel in found if other == target} for target in (75, 80, 90)}
    assert kernels[75] == kernels[80] == kernels[90] != set()
