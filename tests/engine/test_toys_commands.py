"""The methods of tests/toys.py in the commands, in parameter groups, under DeepSpeed's checks and with a memory budget."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import hf_efcp
from hf_efcp import OptionError, parameter_groups
from hf_efcp.bench import measuring, sweep
from hf_efcp.cli.main import main
from hf_efcp.engine.adamw import ADAMW, AdamWOptions
from hf_efcp.engine.base import EngineOptimizer
from hf_efcp.engine.options import StateOptions
from hf_efcp.engine.tensorwise import Tensorwise
from hf_efcp.integrations import deepspeed
from tests import toys
from tests.cli.helpers import assert_one_line_of_error, module, optimizer_of, write_shapes, written
from tests.distributed.processes import run
from tests.engine.test_toys import build, gradients, problem, train
from tests.optim.helpers import differences, snapshot, through_a_file

NAMES = ("efcp_toy_mean", "efcp_toy_factors")
BOTH = ("--optim", ",".join(NAMES))
BY_NAME = pytest.mark.parametrize("name", NAMES)
# The first matrix is larger than all others together: two processes divide it.
SHAPES = {"embed.weight": [130, 12], "a.weight": [30, 12], "b.weight": [30, 12], "a.bias": [31], "conv": [8, 3, 3, 3]}


@pytest.fixture(autouse=True)
def registered():
    with toys.registered():
        yield


@pytest.fixture
def shape_file(tmp_path):
    return str(write_shapes(tmp_path, SHAPES))


def model(dtype=torch.float32):
    return module(SHAPES, dtype).to_empty(device="cpu")


@pytest.mark.parametrize("optim_args", ["", "error_dtype=bf16", "error_format=int4"])
@pytest.mark.parametrize("targets", [None, "a"])
def test_estimate_is_what_one_process_holds_to_the_byte(optim_args, targets, tmp_path, shape_file, capsys):
    flags = ["--optim_args", optim_args, *(["--optim_target_modules", targets] if targets else [])]
    entries = written("estimate", tmp_path, shape_file, *BOTH, *flags)["optimizers"]
    said = capsys.readouterr().out
    for name in NAMES:
        assert entries[name]["bytes"] == optimizer_of(name, model(), optim_args, targets).memory_footprint()
        assert f"{entries[name]['total']:,}" in said


def held(rank):
    """Bytes of this process under DDP and FSDP2, by name."""
    toys.register()
    mesh = init_device_mesh("cpu", (2,))
    both = model, lambda: fully_shard(model(), mesh=mesh)
    return [{name: optimizer_of(name, make()).memory_footprint() for name in NAMES} for make in both]


def test_estimate_is_what_the_fuller_of_two_processes_holds_to_the_byte(tmp_path, shape_file):
    for flags, processes in zip(([], ["--fsdp"]), zip(*run(2, held), strict=True), strict=True):
        entries = written("estimate", tmp_path, shape_file, *BOTH, "--num_processes", "2", *flags)["optimizers"]
        for name in NAMES:
            fuller = max((footprints[name] for footprints in processes), key=lambda kinds: sum(kinds.values()))
            assert entries[name]["bytes"] == fuller, (name, flags)


def test_bench_shows_phases_roofline_and_ratio(tmp_path, shape_file, capsys):
    flags = ["--steps", "2", "--warmup", "1", "--quick", "--device", "cpu", "--threads", "1"]
    entries = written("bench", tmp_path, shape_file, *BOTH, *flags)["optimizers"]
    said = capsys.readouterr().out
    assert set(entries) == set(NAMES)
    for name, entry in entries.items():
        assert set(entry["phases_ms"]) == set(measuring.PHASES)
        assert entry["phases_ms"]["compress"] > 0 and entry["phases_ms"]["update"] > 0
        assert sum(entry["phase_share"].values()) == pytest.approx(1)
        assert entry["roofline"]["phases_ms"]["compress"] > 0 and entry["roofline"]["phases_ms"]["update"] > 0
        assert entry["ratio"] == pytest.approx(entry["step_ms"]["median"] / entry["roofline"]["ms"])
        assert entry["bytes"] == optimizer_of(name, model()).memory_footprint()
        assert said.count(f"| {name} ") == 3


def test_a_method_without_a_window_is_not_filled():
    params = problem(torch.float32)
    optimizer = build("efcp_toy_factors", params)
    train(optimizer, params, 0, 3)
    before = snapshot(optimizer, params)
    measuring.fill(optimizer)
    assert differences(before, snapshot(optimizer, params)) == []


def test_a_sweep_takes_both(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sweep, "_SIDE", 32)
    flags = ["--sweep_parameters", "1e3,4e3", "--sweep_windows", "3,6", "--steps", "1", "--warmup", "0", "--quick"]
    found = written("bench", tmp_path, "--sweep", *BOTH, *flags, "--device", "cpu")
    points = [(p["optimizer"], p["parameters"], p["window_size"]) for p in found["points"]]
    assert sorted(points) == sorted((name, d, m) for name in NAMES for d in (1024, 4096) for m in (3, 6))
    assert set(found["exponents"]) == set(NAMES)


def test_list_shows_both_with_their_options(capsys):
    assert main(["list", "efcp_toy*", "--options"]) == 0
    mean, factors = capsys.readouterr().out.split("\n\n")[:2]
    assert mean.startswith("efcp_toy_mean ") and factors.startswith("efcp_toy_factors ")
    rows = {line.split()[0]: line.split()[1:4] for line in factors.splitlines()[1:]}
    assert rows["mean_decay"] == ["float", "0.5", "0.5"] and rows["shard"] == ["str", "off", "auto"]
    assert "window_size" in mean and "window_size" not in rows and "comm" not in {*rows, *mean.split()}


@BY_NAME
def test_factors_are_sent_by_neither(name, shape_file, capsys):
    with pytest.raises(OptionError, match=f"unknown option 'comm' for {name}: .*valid: "):
        hf_efcp.create_optimizer(name, problem(), lr=0.1, comm="factors")
    message = f"unknown option 'comm' for {name}: "
    assert_one_line_of_error(capsys, message, "estimate", shape_file, "--optim", name, "--optim_args", "comm=factors")
    with pytest.raises(OptionError, match=r"register_comm_hook is for comm='factors', and this Toy.* has no option comm"):
        build(name, problem()).register_comm_hook(nn.Linear(2, 2))


# Parameter groups --------------------------------------------------------------------------------------------------------


def test_what_is_not_compressed_has_torchs_adamw(caplog):
    """optim_target_modules=a: the other matrices, and all vectors."""
    torch.manual_seed(0)
    mine = nn.ModuleDict({"a": nn.Linear(12, 10), "b": nn.Linear(12, 10)}).double()
    theirs = nn.ModuleDict({"a": nn.Linear(12, 10), "b": nn.Linear(12, 10)}).double()
    theirs.load_state_dict(mine.state_dict())
    groups = parameter_groups(mine, 0.1, target_modules="a")
    assert "a method without a window trains them by AdamW" in caplog.text
    optimizer = hf_efcp.create_optimizer("efcp_toy_factors", groups, lr=0.02)
    decays = [{"params": [p for p in theirs.parameters() if (p.ndim > 1) == decays]} for decays in (True, False)]
    reference = torch.optim.AdamW([{**decays[0], "weight_decay": 0.1}, {**decays[1], "weight_decay": 0.0}], lr=0.02)
    for step in range(10):
        gradients(list(mine.parameters()), step)
        for p, q in zip(mine.parameters(), theirs.parameters(), strict=True):
            q.grad = p.grad.clone()
        optimizer.step()
        reference.step()
    for name in ("b.weight", "a.bias", "b.bias"):
        torch.testing.assert_close(mine.get_parameter(name), theirs.get_parameter(name), rtol=1e-13, atol=1e-14)
        assert optimizer.state[mine.get_parameter(name)].keys() - {"counter", "skipped"} == {"step", "exp_avg", "exp_avg_sq"}
    assert {"mean", "right", "error"} < optimizer.state[mine.a.weight].keys()
    assert not torch.allclose(mine.a.weight, theirs.a.weight, rtol=1e-3)


# DeepSpeed ---------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class NoRankOptions(AdamWOptions, StateOptions):
    """A per-tensor method whose options do not tell that it takes matrices."""


class NoRank(EngineOptimizer):
    options_type = NoRankOptions
    method = Tensorwise(ADAMW, ADAMW)


@pytest.mark.parametrize("cls", [toys.ToyFactors, NoRank])
@pytest.mark.parametrize("stage", [1, 2])
def test_flat_pieces_are_not_for_a_method_that_takes_tensors(stage, cls):
    message = f"stage={stage} flattens the parameters, and {cls.__name__} needs matrices: use stage 0, or use DDP"
    with pytest.raises(OptionError, match=message):
        deepspeed.check_config({"zero_optimization": {"stage": stage}}, cls, {})


def test_deepspeed_takes_what_it_can():
    for stage in (0, 1, 2):
        deepspeed.check_config({"zero_optimization": {"stage": stage}}, toys.ToyMean, {})
    deepspeed.check_config({}, toys.ToyFactors, {})
    for cls in (toys.ToyMean, toys.ToyFactors):
        with pytest.raises(OptionError, match=f"stage=3: {cls.__name__} allows 0, 1 and 2"):
            deepspeed.check_config({"zero_optimization": {"stage": 3}}, cls, {})
    with pytest.raises(OptionError, match="scope='layer': DeepSpeed"):
        deepspeed.check_config({"zero_optimization": {"stage": 2}}, toys.ToyMean, {"scope": "layer"})


# memory_budget -----------------------------------------------------------------------------------------------------------


def budgeted(params, budget):
    return hf_efcp.create_optimizer("efcp_toy_mean", params, lr=0.02, memory_budget=budget)


@pytest.mark.parametrize(("budget", "choice"), [(10**9, (1024, "plain")), ("100kB", (32, "plain")), ("20kB", (16, "low_bit"))])
def test_a_budget_is_kept_and_spent_again_after_resuming(budget, choice, caplog):
    params = problem(torch.float32)
    optimizer = budgeted(params, budget)
    estimate = optimizer.estimate_footprint()
    train(optimizer, params, 0, 5)
    held = optimizer.memory_footprint()
    assert held == estimate and sum(held.values()) <= optimizer.options.memory_budget
    assert (optimizer.options.window_size, optimizer.options.window_format) == choice
    assert "ToyMean: memory_budget=" in caplog.text
    saved = through_a_file(optimizer.state_dict())
    others = [nn.Parameter(p.detach().clone()) for p in params]
    other = budgeted(others, budget)
    other.load_state_dict(saved)
    train(optimizer, params, 5, 8)
    train(other, others, 5, 8)
    assert differences(snapshot(optimizer, params), snapshot(other, others)) == []


def test_a_budget_that_is_too_small_names_the_least():
    with pytest.raises(OptionError, match=r"memory_budget=100 bytes is too small: the least possible state .* takes \d+ bytes"):
        budgeted(problem(torch.float32), 100).estimate_footprint()
