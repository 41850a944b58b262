"""FSDP2: parameters that are DTensors, state that follows their rows."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import hf_efcp
from hf_efcp import OptionError
from tests.distributed.fsdp2 import BF16, HSDP, Parameters, divided, flat, full, gradients, runs_models, train
from tests.distributed.processes import run
from tests.distributed.test_sharding import VARIANTS, build, variants_of
from tests.reference import IN_TURN, info, known_to, names, relative

# Entries in a basis that is another one on another number of processes.
_IN_A_BASIS = ("warm_start", "window_p", "window_q", "projector", "exp_avg")


def train_everything(rank, dtype, layout, variants):
    results = {}
    for name in IN_TURN:
        for i in variants_of(name, variants):
            params = list(divided(dtype, layout).parameters())
            optimizer = build(name, params, shard="auto", **VARIANTS[i])
            train(optimizer, params)
            results[name, i] = flat(params)
    return results


def ulp_apart(name, variant, expected, towards):
    """How far one process gets from `expected` with gradients that are 1 ulp off."""
    params = list(Parameters(torch.float32).parameters())
    train(build(name, params, **variant), params, perturbed=towards)
    return relative(flat(params), expected)


@pytest.mark.parametrize(
    ("processes", "dtype", "layout", "variants"),
    [
        (2, torch.float64, None, (0, 1, 2)),
        pytest.param(2, torch.float32, None, (0,), marks=pytest.mark.slow),
        pytest.param(4, torch.float64, None, (2,), marks=pytest.mark.slow),  # 5 rows: the last process has none
        pytest.param(4, torch.float64, HSDP, (0,), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_parameters_are_those_of_one_process(processes, dtype, layout, variants):
    everybody = run(processes, train_everything, dtype, layout, variants)
    for name in IN_TURN:
        for i in variants_of(name, variants):
            alone = list(Parameters(dtype).parameters())
            optimizer = build(name, alone, **VARIANTS[i])
            train(optimizer, alone)
            bound = 1e-9
            if dtype == torch.float32:
                # All of them amplify rounding; which gets furthest is chance.
                bound = 2 * max(ulp_apart(name, VARIANTS[i], flat(alone), t) for t in (torch.inf, -torch.inf, 0.0))
            for theirs in everybody:
                assert torch.equal(theirs[name, i], everybody[0][name, i])
            assert relative(everybody[0][name, i], flat(alone)) <= bound, (name, VARIANTS[i])


def state_after_a_step(optimizer, params):
    gradients(params, 0)
    optimizer.step()
    entries = optimizer.state_dict()["state"]
    return {(i, name): full(t) for i, entry in entries.items() for name, t in entry.items()}


def first_states(rank):
    found = {}
    for name in IN_TURN:
        params = list(divided().parameters())
        found[name] = state_after_a_step(build(name, params, **BF16), params)
    return found


def test_the_state_is_that_of_one_process_in_shape_dtype_and_value():
    """Rounding to bf16 included, which draws numbers by an entry's place in the whole."""
    for everybody in run(4, first_states):
        for name in IN_TURN:
            params = list(Parameters().parameters())
            alone = state_after_a_step(build(name, params, **BF16), params)
            assert everybody[name].keys() == alone.keys()
            for key, t in alone.items():
                if info(name).compression == "low rank" and key[1] in _IN_A_BASIS:
                    continue  # another basis of the same row
                theirs = everybody[name][key]
                assert theirs.shape == t.shape
                assert theirs.dtype == (torch.int32 if t.dtype == torch.int16 else t.dtype)  # int16 cannot be sent
                exact = info(name).compression != "low rank" and key[1] != "gram"  # low rank and K: sums in another order
                bound = 0 if exact else 1e-2 * t.double().norm()
                assert (theirs.double() - t.double()).norm() <= bound, (name, key)


def model_and_optimizer(name, rank_of_window=4, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(3000, 64), *(nn.Linear(64, 64) for _ in range(12)), nn.Linear(64, 256))
    options |= {"low rank": {"rank": rank_of_window}, "sparse": {"density": 0.01}}.get(info(name).compression, {})
    if dist.is_initialized():
        model = fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return model, hf_efcp.create_optimizer(name, model, **known_to(name, {"lr": 0.1, "window_size": 32, **options}))


def replicated(optimizer):
    return sum(t.nbytes for entry in optimizer.state.values() for n, t in entry.items() if n in ("window_q", "warm_start"))


def footprints(rank):
    found = {}
    for name in names(windowed=True):
        _, optimizer = model_and_optimizer(name)
        found[name] = sum(optimizer.memory_footprint().values()), replicated(optimizer), optimizer.sharding_plan()
    return found


@pytest.mark.parametrize("processes", [2, 4])
def test_each_process_holds_its_share_and_all_of_q(processes):
    everybody = run(processes, footprints)
    for name in names(windowed=True):
        _, optimizer = model_and_optimizer(name)
        k = optimizer.memory_footprint()
        k = k["gram"] + k["step"] + k["skipped"]
        total = sum(optimizer.memory_footprint().values()) - k - replicated(optimizer)
        for held, q, plan in (found[name] for found in everybody):
            assert q == replicated(optimizer)
            assert held - k - q <= 1.1 * total / processes, name
            assert plan == everybody[0][name][2]
            assert "every tensor divided by rows, as the parameters are" in plan


def all_reduces_of(function):
    """Numbers sent in each all-reduce."""
    sent, original = [], dist.all_reduce
    dist.all_reduce = lambda t, **k: (sent.append(t.numel()), original(t, **k))[1]
    try:
        function()
    finally:
        dist.all_reduce = original
    return sent


def count_collectives(rank):
    """(name -> the all-reduces of a step, in numbers)."""
    counted = {}
    for name in names(windowed=True):
        for iterations in (1, 2) if info(name).compression == "low rank" else (1,):
            params = list(divided().parameters())
            extra = {"power_iterations": iterations} if info(name).compression == "low rank" else {}
            optimizer = build(name, params, **extra)
            train(optimizer, params, 0, 2)
            gradients(params, 2)
            counted[name, iterations] = all_reduces_of(optimizer.step)
    return counted


def test_collectives_are_those_of_the_docs():
    """One all-reduce of m + 1 numbers; for each low-rank shape and power iteration, two of r x r and one of cols x r."""
    everybody = run(2, count_collectives)
    assert everybody[0] == everybody[1]
    shapes = [(12, 1), (10, 1), (12, 1), (6, 1), (8, 1)]  # cols of the test problem's matrices, and how many have that shape
    for (name, iterations), sent in everybody[0].items():
        if info(name).compression != "low rank":
            assert sent == [7]
            continue
        per_tensor = [n * numbers for cols, n in shapes for _ in range(iterations) for numbers in (4, 4, cols * 2)]
        assert sorted(sent) == sorted([*per_tensor, 7]), name


def alike(rank):
    """Twelve matrices of one shape are one batch: three all-reduces for all of them."""
    model, optimizer = model_and_optimizer("efcp_lowrank_mfac")
    for p in model.parameters():
        p.grad = distribute_tensor(torch.ones(p.shape), p.device_mesh, p.placements)
    optimizer.step()
    return all_reduces_of(optimizer.step)


def test_tensors_of_one_shape_share_their_collectives():
    sent, _ = run(2, alike)
    assert len(sent) == 3 * 3 + 1
    assert sent.count(12 * 64 * 4) == 1


def skip_one(rank):
    params = list(divided().parameters())
    optimizer = build("efcp_sparse_mfac", params)
    train(optimizer, params, 0, 3)
    before = flat(params)
    gradients(params, 3)
    if rank == 1:
        params[0].grad.to_local()[0, 0] = torch.nan
    with pytest.warns(RuntimeWarning, match="not finite"):
        optimizer.step()
    assert torch.equal(flat(params), before)
    train(optimizer, params, 4, 6)
    return flat(params), optimizer.diagnostics()["skipped_steps"]


def test_a_gradient_that_is_not_finite_in_one_shard_is_skipped_by_all():
    (first, skipped), (second, _) = run(2, skip_one)
    assert skipped == 1
    assert torch.equal(first, second)
    assert first.isfinite().all()


def refusals(rank):
    mesh = init_device_mesh("cpu", (2,))
    columns = nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh, [Shard(1)]))
    rows = nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh, [Shard(0)]))
    whole = nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh, [Replicate()]))
    plain = nn.Parameter(torch.ones(4, 4))
    told = []
    for params, options in (
        ([columns], {}),
        ([rows, plain], {}),
        ([rows, whole], {}),
        ([rows], {"process_group": dist.group.WORLD}),
    ):
        try:
            optimizer = hf_efcp.LowRankMFAC(params, 0.1, **options)
            optimizer.memory_footprint()
            told.append("nothing")
        except OptionError as error:
            told.append(str(error))
    return told


def test_what_fsdp2_does_not_make_is_refused():
    columns, plain, whole, group = run(2, refusals)[0]
    assert "allowed is what FSDP2 makes: Shard(dim=0)" in columns
    assert "parameter 1 is a plain tensor" in plain
    assert "parameter 1 is " in whole
    assert "Replicate" in whole
    assert "process_group has no meaning" in group


def policies(rank):
    """Real gradients: bf16 in the model, fp32 parameters; and parameters kept on the CPU by FSDP2."""
    ends = []
    for policy in (
        {"mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.float32)},
        {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
    ):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(13, 11), nn.Tanh(), nn.Linear(11, 3))
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)), **policy)
        optimizer = hf_efcp.create_optimizer("efcp_lowrank_mfac", model, lr=0.02, window_size=8, rank=2, update_rms=0.5)
        x = torch.randn(32, 13, generator=torch.Generator().manual_seed(rank))
        losses = []
        for _ in range(60):
            optimizer.zero_grad()
            loss = (model(x).float() - x[:, :3]).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        ends.append((losses[0], losses[-1], {t.dtype for e in optimizer.state.values() for n, t in e.items() if n == "error"}))
    return ends


@runs_models
def test_mixed_precision_and_offload_policies():
    for ends in run(2, policies):
        for first, last, dtypes in ends:
            assert last < 0.5 * first
            assert dtypes == {torch.float32}
