"""Low-bit state: the update is that of the rows as stored, the error is what they left out, and every byte is counted."""

import pytest
import torch

from hf_efcp.core.cells import Layout, matrix_shape
from hf_efcp.engine.formats import EntryFormat
from hf_efcp.engine.stacks import Piece
from hf_efcp.engine.windowed import WindowStack
from hf_efcp.kernels.constants import BLOCK
from hf_efcp.options import OptionError
from tests.optim.helpers import EVERY, WINDOWED, M, count, gradients_at, started
from tests.reference import (
    NAMES,
    each,
    error,
    few_names,
    ggt_oracle,
    info,
    make,
    mfac_oracle,
    names,
    parameters,
    relative,
    row,
    update_of,
    window,
)

SMALL = {"window_format": "low_bit", "error_format": "int4"}
FORMATS = pytest.mark.parametrize("formats", [SMALL, {"error_format": "int8"}, {"window_format": "low_bit"}], ids=str)
# Rows longer than a block of the quantizer, too.
SHAPES = ((7,), (600,), (12, 30), (12, 30), (40, 11), (3, BLOCK + 50), (8, 3, 3, 3), (3, 4), ())


@FORMATS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@WINDOWED
def test_the_update_is_that_of_the_rows_as_stored(name, dtype, formats):
    params = parameters(SHAPES, dtype)
    family = {"damping": 1e-3} if info(name).family == "mfac" else {}
    optimizer = make(name, params, window_size=M, **family, **formats)
    for t in range(M + 2):
        gradients_at(t, params)
        u = update_of(optimizer, params)
        g = window(optimizer, params)
        x = g[t % M]
        expected = mfac_oracle(g, x, 1e-3, M, dtype) if info(name).family == "mfac" else ggt_oracle(g, x, 1e-5, dtype)
        assert relative(u, expected) < (1e-9 if dtype == torch.float64 else 2e-4)


@FORMATS
@WINDOWED
def test_the_error_is_what_the_row_left_out_but_for_one_unit(name, formats):
    optimizer, params = started(name, shapes=SHAPES, dtype=torch.float64, **formats)
    for t in range(20, 24):
        before, slot = [error(optimizer, p).clone() for p in params], count(optimizer) % M
        gradients_at(t, params)
        optimizer.step()
        for p, e in zip(params, before, strict=True):
            left = e + p.grad.flatten() - row(optimizer, p, slot)
            off = (error(optimizer, p) - left).abs()
            scale = optimizer.state[p].get("error_scale")
            if scale is not None:
                cols = p.numel() // len(scale)
                unit = scale.repeat_interleave(BLOCK, 1)[:, :cols].flatten()
                assert (off <= unit * (1 + 1e-9)).all()
            else:
                assert (off <= 1e-14).all()


@WINDOWED
def test_a_low_bit_row_is_close_to_the_row_that_it_stands_for(name):
    """The first row, of the same gradient: nothing has been fed back yet."""
    rows = []
    for formats in ({}, SMALL):
        optimizer, params = started(name, steps=1, shapes=SHAPES, dtype=torch.float64, **formats)
        rows.append([row(optimizer, p, 0) for p in params])
    for p, exact, stored in zip(params, *rows, strict=True):
        compression = info(name).compression if p.ndim > 1 else "dense"
        bound = {"sparse": 0.1, "low rank": 0.05, "dense": 0.01}[compression]
        assert relative(stored, exact) < bound, p.shape


@pytest.mark.parametrize("name", each([n for n in NAMES if "error_format" in info(n).options()]))
def test_without_a_gradient_the_error_stays_bit_for_bit(name):
    optimizer, params = started(name, shapes=SHAPES, **SMALL)
    before = {n: t.clone() for n, t in optimizer.state[params[3]].items() if n.startswith("error")}
    gradients_at(20, params)
    params[3].grad = None  # one of a stack of two
    optimizer.step()
    assert sorted(before) == ["error", "error_scale"]
    assert all(torch.equal(t, optimizer.state[params[3]][n]) for n, t in before.items())


def test_int8_and_int4_errors_take_their_bytes():
    for bits, per_number in ((8, 1), (4, 0.5)):
        optimizer, _ = started("efcp_sparse_mfac", steps=1, shapes=[(64, 512)], error_format=f"int{bits}")
        assert optimizer.memory_footprint()["error"] == 64 * 512 * per_number + 64 * 2 * 4


@FORMATS
@pytest.mark.parametrize("scope", ["model", "layer"])
@WINDOWED
def test_estimated_bytes_are_those_that_are_held(name, scope, formats):
    optimizer = make(name, parameters(SHAPES, torch.bfloat16), window_size=M, scope=scope, momentum=0.5, **formats)
    expected = sum(optimizer.estimate_footprint().values())
    assert not optimizer.state
    assert sum(optimizer.memory_footprint().values()) == expected


def test_low_bit_windows_take_their_bytes():
    def bytes_of(name, shape, **options):
        optimizer = make(name, parameters([shape], torch.float32), window_size=M, window_format="low_bit", **options)
        return optimizer.memory_footprint()["window"]

    assert bytes_of("efcp_dense_mfac", (5, 300)) == M * (5 * 300 + 5 * 2 * 4)
    assert bytes_of("efcp_lowrank_mfac", (100, 300), rank=4) == M * 4 * (100 + 300 + 2 * 4)
    assert bytes_of("efcp_sparse_mfac", (100, 3000), density=0.01, block_size=1024) == M * 100 * (2 * (10 + 10 + 10) + 3)


@pytest.mark.parametrize("name", names(compression="sparse", windowed=True))
def test_long_blocks_do_not_fit_into_low_bit_entries(name):
    with pytest.raises(OptionError, match="block_size=2048: at most 1024 with window_format=low_bit"):
        make(name, parameters(), window_format="low_bit", block_size=2048)
    make(name, parameters(), block_size=2048)


@pytest.mark.parametrize(
    ("option", "allowed"), [("window_format", "plain or low_bit"), ("error_format", "plain or int8 or int4")]
)
def test_unknown_formats(option, allowed):
    with pytest.raises(OptionError, match=f"{option}='int3': must be {allowed}"):
        make("efcp_lowrank_mfac", parameters(), **{option: "int3"})


@pytest.mark.parametrize("option", ["window_format", "error_format"])
def test_a_checkpoint_of_another_format_is_refused(option):
    other, _ = started("efcp_lowrank_mfac", **{option: SMALL[option]})
    optimizer, _ = started("efcp_lowrank_mfac", **{option: "plain"})
    with pytest.raises(OptionError, match=f"made with {option}='{SMALL[option]}', this optimizer has {option}='plain'"):
        optimizer.load_state_dict(other.state_dict())


def left_of_the_loss(name, steps=150, **formats):
    """Noisy least squares with cosine decay: mean loss of the last 20 steps over the first."""
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(24, 40, generator=generator)
    w, b = torch.nn.Parameter(torch.zeros(24, 40)), torch.nn.Parameter(torch.zeros(24))
    family = {"damping": 1e-3} if info(name).family == "mfac" else {}
    optimizer = make(name, [w, b], lr=0.05, window_size=16, update_rms=1.0, **family, **formats)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses = []
    for _ in range(steps):
        x = torch.randn(32, 40, generator=generator)
        loss = (x @ (w - target).T + b - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return sum(losses[-20:]) / 20 / losses[0]


@pytest.mark.parametrize("name", few_names(names(windowed=True)))
def test_small_formats_train_a_toy_as_plain_ones_do(name):
    plain, small = left_of_the_loss(name), left_of_the_loss(name, **SMALL)
    assert plain < 0.5
    assert small < 1.25 * plain  # low-rank GGT: 1.17, as rank 2 of 24 leaves most of the gradient to 4 bits; others: 1.01


# Parameters in bf16 without an fp32 copy -----------------------------------------------------------------------------------


def test_an_update_below_half_a_unit_moves_bf16_parameters_in_the_mean():
    """p <- 1 - lr u in bf16, whose next numbers below and above 1 are 1/256 and 1/128 away."""

    def walked(stochastic_rounding):
        p = torch.nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
        optimizer = make("efcp_dense_mfac", [p], lr=1e-4, window_size=1, update_rms=1.0, stochastic_rounding=stochastic_rounding)
        for _ in range(100):
            p.grad = torch.ones_like(p)
            optimizer.step()
        return 1 - p.detach().float()

    assert (walked(False) == 0).all()
    walk = walked(True)
    assert abs(walk.mean() - 100 * 1e-4) < 4 * (100 * 1e-4 / 256 / 64**2) ** 0.5 and walk.std() > 0


def applied(p, update, step, rows=None, weight_decay=0.1):
    """The parameter after p <- SR((1 - lr wd) p - lr u), done to some of its rows only."""
    p = torch.nn.Parameter(p.detach().clone(memory_format=torch.preserve_format))
    options = make("efcp_dense_mfac", [p], stochastic_rounding=True).options
    stack = WindowStack([Piece(p, 3, rows)], EntryFormat(Layout.of(p), options))
    stack.buffers["window_rows"][0, 0] = update
    p.grad = torch.zeros_like(p)  # without a gradient it would stay where it is
    c = torch.zeros(1, options.window_size).index_fill_(1, torch.tensor(0), 1.0)
    stack.open(torch.tensor(step))
    stack.apply(c, torch.zeros(len(c)), [{"lr": 0.01, "weight_decay": weight_decay}], options)
    return p.detach()


@pytest.mark.parametrize(
    "shape", [(5,), (6, 4, 3, 3), *(pytest.param(s, marks=pytest.mark.slow) for s in ((), (6, 40)))], ids=str
)
def test_parameters_are_rounded_right_in_the_mean(shape):
    p = torch.nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16())
    if len(shape) == 4:
        p = torch.nn.Parameter(p.detach().to(memory_format=torch.channels_last))
    update = torch.randn(matrix_shape(p), generator=torch.Generator().manual_seed(1))
    exact = p.detach().double() * (1 - 0.001) - 0.01 * update.view(shape).double()
    below, above = (
        torch.nextafter(exact.bfloat16(), exact.bfloat16() * s) for s in (torch.tensor(0.0), torch.tensor(4.0).bfloat16())
    )
    unit = (above.double() - below.double()).abs()
    trials = [applied(p, update, t).double() for t in range(400)]
    assert all(((x - exact).abs() <= unit).all() for x in trials)
    assert ((sum(trials) / 400 - exact).abs() < 4.5 * 0.5 * unit / 20).all()


def test_rows_are_rounded_as_in_the_whole_parameter():
    p = torch.nn.Parameter(torch.randn(7, 30).bfloat16())
    update = torch.randn(7, 30)
    part = applied(p, update[2:6], 5, slice(2, 6))
    assert torch.equal(part[2:6], applied(p, update, 5)[2:6]) and torch.equal(part[:2], p[:2])


@EVERY
def test_stochastic_rounding_is_nothing_to_fp32_parameters(name):
    _, params = started(name, stochastic_rounding=True)
    _, others = started(name)
    assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))
