"""`hf-efcp bench --launches`: what is counted, that M-FAC waits for nothing, and ceilings for what a step may launch and move."""

import functools
import importlib.util
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from hf_efcp.bench import launches
from hf_efcp.bench.measuring import PHASES
from hf_efcp.cli.common import chosen
from hf_efcp.cli.shapes import load
from hf_efcp.engine import sizes
from hf_efcp.kernels import calls
from tests.cli.helpers import assert_one_line_of_error, module, write_shapes, written
from tests.reference import make, names, parameters, set_gradients

SMALL = {"a": (24, 16), "b": (24, 16), "c": (16,)}
# (options, dtype of the parameters)
FORMATS = (
    ("", torch.float32),
    ("preset=paper,momentum=0.9", torch.float64),
    ("window_format=low_bit,error_format=int8", torch.float32),
    ("error_format=int4,scope=layer,stochastic_rounding=true", torch.bfloat16),
)
PAPER = "preset=paper,window_size=32"
CODES = "window_format=low_bit,error_format=int8"
# (compression, model, options) -> the most launches and gigabytes of operands. A change that lowers a figure lowers its ceiling.
CEILINGS = {
    ("low rank", "bert-base", ""): (460, 4.35),
    ("low rank", "bert-base", PAPER + ",rank=4"): (255, 4.55),
    ("low rank", "bert-base", PAPER + ",rank=4," + CODES): (300, 3.4),
    ("sparse", "bert-base", ""): (385, 4.75),
    ("sparse", "bert-base", PAPER): (200, 4.4),
    ("sparse", "bert-base", PAPER + "," + CODES): (225, 3.25),
}
SLOW_CEILINGS = {
    ("low rank", "bert-base", CODES): (460, 3.95),
    ("sparse", "bert-base", CODES): (380, 4.25),
    ("low rank", "llama-1b", ""): (540, 46.2),
    ("low rank", "llama-1b", PAPER + ",rank=4"): (330, 47.6),
    ("sparse", "llama-1b", ""): (450, 52.5),
    ("sparse", "llama-1b", PAPER): (245, 48.3),
}


def counted(name, text="", model=None, **arguments):
    """What a step of an optimizer with these options launches."""
    (options,) = chosen(name, text).values()
    return launches.count(model or module(SMALL), name, options, **arguments)


def of(operation, *shapes, dtype=torch.float32):
    """What an operation on empty tensors of these shapes launches."""
    counter = launches._Counter(None)
    with FakeTensorMode(), launches._without_launches(counter):
        tensors = [torch.empty(shape, dtype=dtype) for shape in shapes]
        with counter:
            operation(*tensors)
    return counter.tallies["rest"]


def test_an_operation_is_a_launch_with_the_bytes_of_its_operands_and_results():
    tally = of(torch.add, (8, 4), (4,))
    assert (tally.launches, tally.bytes) == (1, 4 * (32 + 4 + 32))
    assert (of(torch.Tensor.add_, (8, 4), (4,)).bytes, of(lambda x: x.add_(x), (8, 4)).bytes) == (4 * (32 + 4), 4 * 32)
    assert of(lambda x: x.expand(8, 4).sum(), (4,)).bytes == 4 * (4 + 1)
    assert of(lambda x: x[2:].mul_(2), (8, 4)).bytes == 4 * 24


def test_views_and_allocations_are_none():
    tally = of(lambda x: (x.mT, x[1:, None], x.flatten(), x.unbind(), torch.empty_like(x), x.new_empty(3), x.device), (8, 4))
    assert (tally.launches, tally.bytes) == (0, 0)


@pytest.mark.parametrize(
    "operation",
    [
        lambda x: bool(x.any()),
        lambda x: x.sum().item(),
        lambda x: x[x > 0].sum(),
        lambda x: x.masked_fill_(x > 0, 1).nonzero() + 1,
        lambda x: x[:, x[0] > 0] * 2,
        lambda x: torch.equal(x, x),
    ],
    ids=["bool", "item", "mask", "nonzero", "a mask of columns", "equal"],
)
def test_what_depends_on_numbers_is_a_read(operation):
    tally = of(operation, (8, 4))
    assert tally.reads.total() == 1 and not tally.waits


def test_eigenvalues_and_copies_from_the_host_are_waits():
    assert dict(of(torch.linalg.eigh, (4, 4), dtype=torch.float64).waits) == {"_linalg_eigh": 1}
    assert of(lambda x: x + torch.tensor([1.0, 2.0]), (2,)).waits.total() == 1


def test_kernels_are_launches_with_the_matrices_that_they_take_by_address():
    triton = pytest.importorskip("triton")
    from hf_efcp.kernels.gpu_tools import Addresses

    def nothing(table, like, out, n):
        pass

    kernel = triton.jit(nothing)

    def launch(a, b, c):
        addresses = Addresses([a, b, c], but={1})
        out = torch.empty(5)
        kernel[4, 1](addresses.table, addresses.like, out, 3, num_warps=1)

    tally = of(launch, (8, 4), (8, 4), (8, 4))
    assert (tally.launches, dict(tally.kernels)) == (1, {"nothing": 1})
    assert tally.bytes == 3 * 8 + 4 * (2 * 32 + 5)  # `like` is one of the matrices


@pytest.mark.parametrize(("text", "dtype"), FORMATS, ids=[text or "defaults" for text, _ in FORMATS])
@pytest.mark.parametrize("name", names(family="mfac"))
def test_a_step_of_mfac_waits_for_nothing(name, text, dtype):
    found = counted(name, text, module(SMALL, dtype))
    assert list(found.phases) == list(PHASES)
    assert found.total.launches > 100 and found.total.bytes > 0
    assert not found.total.reads and not found.total.waits


@pytest.mark.parametrize("name", names(family="ggt"))
def test_a_step_of_ggt_waits_for_its_eigenvalues_only(name):
    total = counted(name).total
    assert not total.reads and set(total.waits) == {"_linalg_eigh"}


def test_a_flag_that_the_host_reads_is_found(monkeypatch):
    monkeypatch.setattr(sizes, "readable", lambda device: True)
    assert counted(names(family="mfac")[0], steps=1).phases["rest"].reads


def test_nothing_is_left_behind(monkeypatch):
    name, model = names(compression="sparse")[0], module(SMALL)
    before = set(calls.FAILED), {n: p.device for n, p in model.named_parameters()}
    counted(name, model=model, steps=1)
    assert (calls.FAILED, {n: p.device for n, p in model.named_parameters()}) == before
    monkeypatch.setenv("HF_EFCP_KERNELS", "0")  # saves their compilation
    params = parameters(dtype=torch.float32)
    optimizer = make(name, params)
    set_gradients(params, torch.Generator().manual_seed(0))
    optimizer.step()
    assert all(type(value) is torch.Tensor for value in optimizer.state[params[0]].values())


def test_the_command_prints_and_writes_the_phases(tmp_path, capsys):
    name = names(compression="sparse", family="mfac")[0]
    found = written("bench", tmp_path, "--launches", write_shapes(tmp_path, SMALL), "--optim", name, "--dtype", "bf16")
    assert (found["parameters"], found["dtype"]) == (2 * 24 * 16 + 16, "bfloat16")
    entry = found["optimizers"][name]
    assert entry["options"]["preset"] == "measured" and list(entry["phases"]) == list(PHASES)
    assert entry["total"]["launches"] == sum(tally["launches"] for tally in entry["phases"].values())
    said = capsys.readouterr().out
    assert f"| all      | {entry['total']['launches']:>8,} |" in said and "compress: " in said
    assert bool(entry["phases"]["dots"]["kernels"]) == found["triton"] == ("not installed" not in said)


def test_without_triton_the_command_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setattr(calls, "_loaded", {})
    for loaded in [name for name in sys.modules if name.startswith("hf_efcp.kernels.gpu_")]:
        monkeypatch.delitem(sys.modules, loaded)
    name = names(compression="sparse")[0]
    found = written("bench", tmp_path, "--launches", write_shapes(tmp_path, SMALL), "--optim", name)
    assert not found["triton"] and not found["optimizers"][name]["total"]["kernels"]
    assert "Triton is not installed: its kernels are not counted" in capsys.readouterr().out


BAD = {
    (): "MODEL is missing",
    ("--sweep",): "leave out --sweep",
    ("minilm", "--peers", "--device", "cpu"): "leave out --peers, --device",
    ("minilm", "--memory", "1GiB", "--threads", "2"): "leave out --threads, --memory",
    ("minilm", "--dtype", "int7"): "unknown dtype",
}


@pytest.mark.parametrize("flags", BAD, ids=" ".join)
def test_bad_input_is_one_line(flags, capsys):
    assert_one_line_of_error(capsys, BAD[flags], "bench", "--launches", *flags)


@functools.cache
def shapes_of(model):
    return load(model, torch.float32)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
@pytest.mark.parametrize(
    ("case", "ceiling"),
    [*CEILINGS.items(), *(pytest.param(*item, marks=pytest.mark.slow) for item in SLOW_CEILINGS.items())],
    ids=lambda value: "-".join(map(str, value)),
)
def test_launches_and_bytes_stay_below_their_ceilings(case, ceiling):
    compression, model, text = case
    (name,) = names(family="mfac", compression=compression)
    total = counted(name, text, shapes_of(model), steps=2).total
    assert (total.reads, total.waits) == ({}, {})
    assert total.launches <= ceiling[0] and total.bytes <= ceiling[1] * 1e9, (total.launches, total.bytes)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_parameters_in_bf16_are_updated_in_one_pass():
    """The product of 2 bytes a number, written and read; p of 2, read and written; the residual of 2."""
    (name,), model = names(family="mfac", compression="low rank"), load("bert-base", torch.bfloat16)
    update = counted(name, "", model, steps=2).phases["update"]
    assert update.bytes <= 1.0e9 and update.launches <= 85
