"""Specs and cells: shapes of parts, formats, masks of refused steps, tensors without a gradient."""

import pytest
import torch

from hf_efcp import kernels
from hf_efcp.core.accumulated import Accumulated, DenseEntry
from hf_efcp.core.cells import Cell, Layout, QuantizedCell, Spec, Turn, cell, matrix_specs
from hf_efcp.distributed.ddp import plan, size_of, unit
from hf_efcp.distributed.fsdp2 import check_cuts
from hf_efcp.options import OptionError

ROWS = slice(2, 5)


def buffers_of(specs, n):
    return {s.name: torch.full((n, *s.shape), s.start, dtype=s.dtype) for s in specs}


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def made(dtype, format, n=3, rows=6, cols=300, **turn):
    specs = matrix_specs("x", Layout(rows, cols, torch.float32), dtype, format)
    buffers = buffers_of(specs, n)
    return cell(specs[0], buffers, torch.float32, Turn(torch.arange(n), **turn)), buffers


FORMATS = pytest.mark.parametrize(
    ("dtype", "format", "off"),
    [
        (None, "plain", 0),
        (torch.float64, "plain", 0),
        (torch.bfloat16, "plain", 2**-7),
        (None, "int8", 1 / 30),
        (None, "int4", 1.0),
    ],
    ids=str,
)


@FORMATS
def test_what_is_written_is_read_as_far_as_the_format_goes(dtype, format, off):
    x, (c, _) = numbers(3, 6, 300), made(dtype, format)
    c.write(x)
    assert ((c.read() - x).abs() <= off * x.abs().clamp_min(1)).all()
    assert c.read().dtype == torch.float32
    assert torch.equal(c.read(ROWS), c.read()[:, ROWS])
    y = numbers(3, 3, 300, seed=1)
    before = c.read().clone()
    c.write(y, ROWS)
    assert ((c.read(ROWS) - y).abs() <= off * y.abs().clamp_min(1)).all()
    outside = [0, 1, 5]
    assert torch.equal(c.read()[:, outside], before[:, outside])


@FORMATS
@pytest.mark.parametrize("flag", [False, True])
def test_a_flag_on_the_device_decides_whether_anything_is_stored(dtype, format, off, flag):
    c, buffers = made(dtype, format)
    c.write(numbers(3, 6, 300))
    before = {name: t.clone() for name, t in buffers.items()}
    c.turn.ok = torch.tensor(flag)
    c.write(numbers(3, 6, 300, seed=1))
    assert all(torch.equal(t, before[name]) != flag for name, t in buffers.items())


@FORMATS
def test_a_tensor_without_a_gradient_keeps_its_bits_and_the_numbers_that_are_written_stay_as_they_are(dtype, format, off):
    c, buffers = made(dtype, format)
    c.write(numbers(3, 6, 300))
    before = {name: t.clone() for name, t in buffers.items()}
    c.turn.absent = [1]
    x = numbers(3, 6, 300, seed=1)
    c.write(x)
    assert torch.equal(x, numbers(3, 6, 300, seed=1))
    for name, t in buffers.items():
        assert torch.equal(t[1], before[name][1]) and not torch.equal(t[0], before[name][0])


def test_rounding_goes_by_the_place_in_the_whole_tensor():
    """A piece that begins at row 2 is rounded as those rows of the whole."""
    x = numbers(1, 6, 300)
    whole, _ = made(torch.bfloat16, "plain", n=1)
    whole.write(x)
    piece, _ = made(torch.bfloat16, "plain", n=1, rows=3, origin=(2, 0))
    piece.write(x[:, ROWS])
    assert torch.equal(piece.read(), whole.read(ROWS))


def test_an_entry_that_does_not_follow_the_rows_is_rounded_alike_on_every_process():
    """Each process that has some rows of a tensor holds such an entry, and all must hold the same bits."""
    x, spec = numbers(1, 8, 30), Spec("right", (8, 30), torch.bfloat16)
    ours, theirs = (cell(spec, buffers_of([spec], 1), torch.float32, Turn(torch.arange(1), (row, 0))) for row in (0, 70))
    ours.write(x)
    theirs.write(x)
    assert torch.equal(ours.read(), theirs.read())


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_codes_of_another_width_than_the_parameters(format):
    specs = matrix_specs("small", Layout(6, 3, torch.float32), None, format)
    c = cell(specs[0], buffers_of(specs, 2), torch.float32, Turn(torch.arange(2)))
    c.write(numbers(2, 6, 3))
    assert c.read().shape == (2, 6, 3)


def test_the_format_follows_from_the_buffers():
    assert type(made(torch.bfloat16, "plain")[0]) is Cell
    assert type(made(None, "int4")[0]) is QuantizedCell
    scalar = Cell(torch.zeros(3), Turn(torch.arange(3)), torch.float32)
    scalar.write(torch.ones(3))
    assert torch.equal(scalar.read(), torch.ones(3))


def parameter(*shape):
    return torch.nn.Parameter(torch.zeros(*shape))


@pytest.mark.parametrize(
    ("spec", "p", "rows", "shape"),
    [
        (Spec("error", (9, 4), torch.float32, rows=0), parameter(9, 4), slice(2, 7), (5, 4)),
        (Spec("window_p", (3, 2, 9), torch.float32, rows=2), parameter(9, 4), slice(2, 7), (3, 2, 5)),
        (Spec("right", (4, 2), torch.float32), parameter(9, 4), slice(2, 7), (4, 2)),
        (Spec("error", (1, 9), torch.float32, rows=0), parameter(9), slice(2, 7), (1, 5)),  # a vector is one row
        (Spec("root", (3, 4, 4), torch.float32, rows=0, per=4), parameter(9, 4), slice(4, 9), (2, 4, 4)),
        (Spec("error", (9, 4), torch.float32, rows=0, held="each"), parameter(9, 4), slice(2, 7), (9, 4)),
        (Spec("error", (9, 4), torch.float32, rows=0), parameter(9, 4), None, (9, 4)),
        (Spec("row_mean", (1,), torch.float32, rows=0), parameter(9), slice(2, 7), (1,)),  # no entry for each number
    ],
    ids=str,
)
def test_the_part_of_an_entry(spec, p, rows, shape):
    assert spec.part(p, rows) == shape


def test_rows_that_share_an_entry_stay_on_one_process():
    p = parameter(50, 8)
    specs = {
        p: {
            s.name: s for s in (Spec("m", (50, 8), torch.float32, rows=0), Spec("root", (13, 4, 4), torch.float32, rows=0, per=4))
        }
    }
    assert unit(specs[p]) == 4
    (owners,) = plan(specs, 3, {}).values()
    covered = [i for rows in owners.values() for i in range(rows.start, rows.stop)]
    assert len(owners) == 3 and sorted(covered) == list(range(50))
    assert all(rows.start % 4 == 0 for rows in owners.values())
    parts = [specs[p]["root"].part(p, rows)[0] for rows in owners.values()]
    assert sum(parts) == 13


def test_what_is_held_is_counted_in_units_too():
    """A parameter that joins later goes where less is held: 100 rows of one process weigh as much as 25 units of 4."""
    p, q = parameter(100, 8), parameter(100, 8)
    specs = {x: {"root": Spec("root", (25, 4, 4), torch.float32, rows=0, per=4)} for x in (p, q)}
    assert size_of(p, specs[p]).of(slice(0, 100)) == size_of(p, specs[p]).total == 25 * 4 * 4 * 4
    known = plan({p: specs[p]}, 2, {p: {0: slice(0, 100)}})
    (owners,) = [o for x, o in plan(specs, 2, known).items() if x is q]
    assert owners == {1: None}


def test_fsdp2_is_refused_where_it_would_cut_an_entry():
    p = parameter(50, 8)
    specs = {p: {"root": Spec("root", (13, 4, 4), torch.float32, rows=0, per=4)}}
    check_cuts(specs, 1)
    with pytest.raises(OptionError, match="on 2 processes a parameter \\(50, 8\\) would be cut inside a block of 4 rows"):
        check_cuts(specs, 2)
    q = parameter(600)
    codes = {q: {s.name: s for s in matrix_specs("error", Layout.of(q), None, "int8")}}
    with pytest.raises(OptionError, match="1-D tensors cannot have blocks"):
        check_cuts(codes, 2)


@pytest.mark.parametrize("kept", [True, False], ids=["by a kernel", "by torch"])
def test_an_operand_is_used_up_when_its_error_is_kept(kept, monkeypatch):
    c, _ = made(None, "plain")
    a = Accumulated(numbers(3, 6, 300), c)
    entry = DenseEntry(a.rows() / 2)
    if kept:
        monkeypatch.setattr(entry, "keep", lambda error, *args: not error[0].copy_(numbers(3, 6, 300) / 2).isnan().any())
    a.keep(entry)
    torch.testing.assert_close(c.read(), numbers(3, 6, 300) / 2)
    with pytest.raises(RuntimeError, match="use a before"):
        a.times(torch.ones(3, 300, 2))


def test_the_error_of_a_tensor_without_a_gradient_stays_whatever_entry_it_is_given():
    c, _ = made(None, "plain")
    c.write(numbers(3, 6, 300))
    c.turn.absent = [1]
    a = Accumulated(torch.zeros(3, 6, 300), c, absent=[1])
    a.keep(DenseEntry(torch.ones(3, 6, 300)))
    assert torch.equal(c.read()[1], numbers(3, 6, 300)[1])
    assert torch.equal(c.read()[0], numbers(3, 6, 300)[0] - 1)


@pytest.mark.parametrize(("dtype", "by_kernel"), [(torch.float32, False), (torch.bfloat16, True)], ids=str)
def test_on_a_cpu_one_row_goes_to_a_kernel_only_to_be_rounded(dtype, by_kernel, monkeypatch):
    asked = []
    monkeypatch.setattr(kernels, "keep", lambda *args: asked.append(args) or False)
    error = Cell(torch.zeros(2, 1, 9, dtype=dtype), Turn(torch.arange(2)), torch.float32)
    Accumulated(numbers(2, 1, 9), error).keep(DenseEntry(torch.zeros(2, 1, 9)))
    assert bool(asked) == by_kernel
    torch.testing.assert_close(error.read(), numbers(2, 1, 9), rtol=2**-7, atol=0)
