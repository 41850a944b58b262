"""Windows and errors of n tensors, allocated as a stack allocates them."""

import importlib.metadata

import pytest
import torch

from hf_efcp.core.cells import Cell, Layout, Turn, cell, matrix_specs

# Where the tensors begin in larger ones: stochastic rounding counts from there.
ORIGIN = (7, 3)


def allocated(specs, n):
    """Buffers of n tensors, zeros."""
    return {spec.name: torch.zeros(n, *spec.shape, dtype=spec.dtype) for spec in specs}


def turn_of(n, step=0):
    """The turn of n tensors whose numbers are not their positions."""
    return Turn(torch.arange(n) + 5, ORIGIN, torch.tensor(step))


def plain_error(e, dtype, step=0):
    """An error that starts at e (n, rows, cols), in e's own dtype; read in `dtype`."""
    return Cell(e, turn_of(len(e), step), dtype)


def coded_error(bits, n, rows, cols, dtype):
    """An error in 8 or 4 bits, which starts at zero."""
    layout = Layout(rows, cols, dtype)
    specs = matrix_specs("error", layout, None, f"int{bits}")
    return cell(specs[0], allocated(specs, n), dtype, turn_of(n))


def needs_tiles_of_one_number():
    """Skip a test in an interpreter that loads a masked tile of one number as 0: Triton 3.2's. Compiled kernels do not."""
    if tuple(map(int, importlib.metadata.version("triton").split(".")[:2])) < (3, 3):
        pytest.skip("the interpreter of this Triton cannot load a masked tile of one number")
