"""`hf-efcp bench`: counts against numbers worked out by hand, what it measures, and what it refuses."""

import time

import pytest
import torch

from hf_efcp.bench import command as bench
from hf_efcp.bench import measuring, peers, roofline
from hf_efcp.cli.common import chosen
from hf_efcp.cli.main import main
from tests.cli.helpers import assert_one_line_of_error, module, optimizer_of, write_shapes, written
from tests.reference import NAMES, stack_of, window

CPU = torch.device("cpu")
LIST = {"a.weight": (64, 48), "a.bias": (48,)}


def allocated(shapes_=LIST, dtype=torch.float32):
    model = module(shapes_, dtype)
    return model, bench.materialize(model, CPU)


def started(name, optim_args="", steps=1, shapes_=LIST, dtype=torch.float32):
    model, generator = allocated(shapes_, dtype)
    optimizer = optimizer_of(name, model, optim_args)
    for _ in range(steps):
        bench.new_gradients(list(model.parameters()), generator)
        optimizer.step()
    return optimizer, model, generator


@pytest.fixture
def shape_file(tmp_path):
    return str(write_shapes(tmp_path, LIST))


# As in docs/benchmarks/roofline.md: (fp32, fp64, bytes) by phase.
SOLVE = (0, 32**3 / 3 + 2 * 32**2, 8 * 32**2 + 16 * 32)
BY_HAND = {
    ("efcp_lowrank_mfac", "rank=4"): {
        "compress": (49152, 0, 19392),
        "dots": (0, 117760, 61504),
        "feedback": (24576, 0, 8896),
        "solve": SOLVE,
        "update": (789504, 0, 63488 + 24960),
    },
    ("efcp_sparse_mfac", "density=0.25,block_size=16"): {
        "compress": (0, 0, 18624),
        "dots": (0, 52224, 148800),
        "feedback": (768, 0, 10944),
        "solve": SOLVE,
        "update": (52224, 0, 153600 + 24960),
    },
    ("efcp_dense_mfac", ""): {
        "compress": (0, 0, 12480),
        "dots": (0, 199680, 386880),
        "feedback": (0, 0, 12480),
        "solve": SOLVE,
        "update": (199680, 0, 399360 + 24960),
    },
}


@pytest.mark.parametrize(("name", "optim_args"), BY_HAND)
def test_counts_are_those_worked_out_by_hand(name, optim_args):
    counts = roofline.count(started(name, optim_args)[0])
    assert {phase: (c.fp32, c.fp64, c.bytes) for phase, c in counts.items()} == {
        phase: pytest.approx(numbers) for phase, numbers in BY_HAND[name, optim_args].items()
    }


def test_counts_follow_the_options():
    def total(optim_args, name="efcp_lowrank_mfac", dtype=torch.float32):
        counts = roofline.count(started(name, optim_args, dtype=dtype)[0])
        return sum(counts.values(), roofline.Count()), counts

    plain, _ = total("")
    d = 64 * 48 + 48
    assert total("momentum=0.5")[0].bytes == plain.bytes + 8 * d
    assert total("weight_decay_mode=l2")[0].bytes == plain.bytes + 4 * d
    assert total("error_dtype=fp32")[0].bytes == plain.bytes + 2 * 2 * 64 * 48
    assert total("power_iterations=3")[0].fp32 == plain.fp32 + 2 * 4 * 64 * 48 * 4
    assert total("", dtype=torch.bfloat16)[0].bytes == plain.bytes - 3 * 2 * d
    assert total("scope=layer")[1]["solve"].fp64 == 2 * total("")[1]["solve"].fp64
    everything, _ = total("error_dtype=fp64", dtype=torch.float64)
    assert everything.fp32 == 0 and everything.fp64 == plain.fp32 + plain.fp64
    assert total("window_size=32", "efcp_lowrank_ggt")[1]["solve"].fp64 == pytest.approx(14 / 3 * 32**3)


def test_roofline_is_the_larger_of_two_times():
    counts = {"dots": roofline.Count(fp32=6e9, fp64=1e9, bytes=5e9), "update": roofline.Count(bytes=1e9)}
    found = roofline.report(counts, {"fp32_flops": 2e9, "fp64_flops": 1e9, "bandwidth": 2e9})
    assert (found["ms"], found["bound"], found["compute_ms"], found["memory_ms"]) == (4000, "compute", 4000, 3000)
    assert found["phases_ms"] == {"dots": 4000, "update": 500}
    assert roofline.report(counts, {"fp32_flops": 2e9, "fp64_flops": 1e9, "bandwidth": 1e9})["ms"] == 6000


@pytest.mark.parametrize("name", NAMES)
def test_a_filled_window_is_one_that_steps_could_have_made(name):
    """Full, no two rows alike, K's diagonal true, and a step on it is taken without the way out for dependent rows."""
    shapes_ = {"a.weight": (64, 48), "b.weight": (50, 60), "a.bias": (48,)}
    optimizer, model, generator = started(name, "window_size=16", 4, shapes_)
    kept = window(optimizer, list(model.parameters()))[:4]
    measuring.fill(optimizer)
    params = list(model.parameters())
    rows = window(optimizer, params)
    assert torch.equal(rows[:4], kept)
    k = optimizer._gram.matrix[0]
    assert torch.allclose(k.diagonal(), rows.square().sum(1))
    cosines = (rows @ rows.T) / (rows.norm(dim=1) * rows.norm(dim=1)[:, None])
    assert (cosines - torch.eye(16)).abs().max() < 0.6
    assert int(optimizer._gram.step) == 16
    for _ in range(17):
        bench.new_gradients(params, generator)
        optimizer.step()
    assert optimizer.diagnostics()["skipped_steps"] == 0
    assert optimizer.diagnostics()["kappa"] < 10


def test_phases_add_up_to_the_step_and_are_told_apart(monkeypatch):
    optimizer, model, _ = started("efcp_dense_mfac", "window_size=4")
    stack = stack_of(optimizer, next(model.parameters()))
    original = type(stack.window).combine

    def slow(self, *args):
        time.sleep(0.05)
        return original(self, *args)

    monkeypatch.setattr(type(stack.window), "combine", slow)
    before = dict(vars(stack))
    with measuring.phases(optimizer, CPU) as found:
        whole = measuring.seconds(optimizer.step, CPU)
    assert set(found) == set(measuring.PHASES) - {"rest"}
    assert 0.1 <= found["update"] < sum(found.values()) <= whole
    assert min(found.values()) > 0
    assert max(t for phase, t in found.items() if phase != "update") < 0.1
    assert vars(stack) == before


def test_temporaries():
    assert 4 * 2**20 <= measuring.temporaries(lambda: torch.zeros(2**20) + 1, CPU) <= 9 * 2**20
    assert measuring.temporaries(lambda: None, CPU) == 0


def test_state_bytes_of_others_counts_what_hides_in_objects():
    model, generator = allocated()
    params = list(model.parameters())
    optimizer = torch.optim.AdamW(params, lr=0.1)
    bench.new_gradients(params, generator)
    optimizer.step()
    count = sum(p.numel() for p in params)
    assert measuring.state_bytes(optimizer) == {"exp_avg": 4 * count, "exp_avg_sq": 4 * count, "step": 8}

    class Projector:
        def __init__(self):
            self.basis = torch.zeros(10)
            self.same = self.basis
            self.gradient = params[0].grad

    optimizer.state[params[0]]["projector"] = Projector()
    assert measuring.state_bytes(optimizer)["projector"] == 40


def test_all_optimizers_and_torchs_in_one_run(tmp_path, shape_file, monkeypatch, capsys):
    mine = {name: entry for name, entry in peers.PEERS.items() if entry[0] == "torch"}
    broken = {"absent": ("no-such-package", None), "broken": ("torch", lambda model, m: 1 / 0)}
    monkeypatch.setattr(peers, "PEERS", mine | broken)
    monkeypatch.setattr(bench, "PEERS", mine | broken)
    flags = ["--steps", "2", "--warmup", "1", "--quick", "--peers", "--device", "cpu", "--threads", "1"]
    found = written("bench", tmp_path, shape_file, "--optim_args", "window_size=8", *flags)
    assert set(found["optimizers"]) == {*NAMES, *mine}
    assert found["skipped"] == {
        "absent": "no-such-package is not installed",
        "broken": "raised ZeroDivisionError: division by zero",
    }
    assert found["machine"]["threads"] == 1 and found["machine"]["cpu"] and found["machine"]["torch"] == torch.__version__
    assert torch.__version__.startswith(found["versions"]["torch"])  # the package's may not tell the build
    rates = found["rates"]
    assert set(rates) == {"bandwidth", "copy_bytes", "scale_bytes", "fp32_flops", "fp64_flops"}
    assert rates["bandwidth"]["max"] == max(rates["copy_bytes"]["max"], rates["scale_bytes"]["max"])
    for name in NAMES:
        entry = found["optimizers"][name]
        assert entry["options"]["window_size"] == 8
        assert set(entry["phases_ms"]) == set(entry["phase_share"]) == set(measuring.PHASES)
        assert sum(entry["phase_share"].values()) == pytest.approx(1)
        assert entry["step_ms"]["min"] <= entry["step_ms"]["median"] <= entry["step_ms"]["max"]
        assert entry["ratio"] == pytest.approx(entry["step_ms"]["median"] / entry["roofline"]["ms"])
        assert entry["bytes"] == started(name, "window_size=8")[0].memory_footprint()
        assert entry["peak_bytes"] == 8 * found["parameters"] + entry["total"] + entry["temporaries"]
    assert "ratio" in found["optimizers"]["torch AdamW fused"] and "ratio" not in found["optimizers"]["torch Adafactor"]
    said = capsys.readouterr()
    assert all(f"| {name} " in said.out for name in (*NAMES, *mine)) and "skipped: absent" in said.out


def test_what_does_not_fit_is_left_out_or_waits(shape_file, capsys):
    assert main(["bench", shape_file, "--steps", "1", "--warmup", "0", "--quick", "--memory", "450kB"]) == 0
    out = capsys.readouterr().out
    assert "skipped: efcp_dense_ggt: its state of 1.27 MiB does not fit" in out
    assert "By turns ran: " in out


def test_low_precision_and_tied_parameters():
    model = torch.nn.Module()
    model.a = torch.nn.Linear(8, 8, bias=False, device="meta", dtype=torch.bfloat16)
    model.b = torch.nn.Linear(8, 8, bias=False, device="meta", dtype=torch.bfloat16)
    model.b.weight = model.a.weight
    found = bench.bench(model, chosen("efcp_sparse_mfac", None), CPU, steps=1, warmup=0, quick=True)
    assert (found["parameters"], found["dtype"]) == (64, "bfloat16")
    assert model.b.weight is model.a.weight and model.a.weight.grad.dtype == torch.bfloat16


def test_sweep(tmp_path, capsys):
    flags = ["--sweep_parameters", "1e6,2e6", "--sweep_windows", "2,8", "--steps", "1", "--warmup", "0", "--quick"]
    found = written("bench", tmp_path, "--sweep", "--optim", "efcp_sparse_mfac", *flags)
    assert [(p["parameters"], p["window_size"]) for p in found["points"]] == [(n * 2**20, m) for n in (1, 2) for m in (2, 8)]
    assert set(found["exponents"]["efcp_sparse_mfac"]) == {"parameters", "window_size"}
    assert "time grows like d^" in capsys.readouterr().out


def test_the_sweep_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    file = tmp_path / "sweep.svg"
    flags = ["--sweep_parameters", "1e6,2e6", "--sweep_windows", "2,4", "--steps", "1", "--warmup", "0", "--quick"]
    assert main(["bench", "--sweep", "--optim", "efcp_sparse_mfac", "--plot", str(file), *flags]) == 0
    assert "<svg" in file.read_text()


def test_the_exponent_is_that_of_a_power_law():
    from hf_efcp.bench.sweep import _exponent

    points = [
        {"optimizer": "x", "parameters": d, "window_size": m, "step_ms": {"median": 3.0 * d * m**2}}
        for d in (10, 100)
        for m in (2, 4, 8)
    ]
    assert _exponent(points, "x", "parameters") == pytest.approx(1)
    assert _exponent(points, "x", "window_size") == pytest.approx(2)
    assert _exponent(points[:1], "x", "window_size") is None


BAD = {
    (): "MODEL is missing",
    ("nosuch",): "unknown model 'nosuch'",
    ("minilm", "--steps", "0"): "steps=0",
    ("minilm", "--warmup", "-1"): "warmup=-1",
    ("minilm", "--threads", "0"): "threads=0",
    ("minilm", "--device", "tpu"): "device='tpu'",
    ("minilm", "--optim", "efcp_lowrank"): "did you mean 'efcp_lowrank_",
    ("minilm", "--memory", "much"): "'much'",
    ("minilm", "--plot", "x.png"): "only a --sweep",
    ("--sweep", "--sweep_windows", "a"): "sweep_windows='a'",
    ("minilm", "--sweep"): "shapes of its own",
    ("--sweep", "--sweep_parameters", "0"): "sweep_parameters='0'",
}


@pytest.mark.parametrize("flags", BAD, ids=" ".join)
def test_bad_input_is_one_line(flags, capsys):
    threads = torch.get_num_threads()
    assert_one_line_of_error(capsys, BAD[flags], "bench", *flags)
    assert torch.get_num_threads() == threads


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_cuda_is_said(capsys):
    assert_one_line_of_error(capsys, "no CUDA device", "bench", "minilm", "--device", "cuda")
