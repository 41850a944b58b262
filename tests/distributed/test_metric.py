"""The metric on two processes: under DDP with a process_group and under FSDP2, N = 2 is N = 1, in one message for each step."""

import warnings

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor

from tests.distributed.fsdp2 import flat, full
from tests.distributed.processes import run
from tests.distributed.test_fsdp2 import all_reduces_of
from tests.reference import make, relative

M, HALF, END = 4, 6, 11
# DDP divides the first by rows, FSDP2 all of them: the vectors too, and the matrix of one row, of which a process has none.
SHAPES = [(130, 12), (12, 10), (12, 10), (7,), (5, 3, 2), (1, 12), (9, 8)]
ADAM = {"metric": "factored", "window_momentum": 0.9, "window_nesterov": True, "update_rms": 1.0, "rms_mode": "adam"}
RUNS = {  # what is compared with one process
    "low rank": ("efcp_lowrank_mfac", ADAM),
    "low rank, decay, l2": ("efcp_lowrank_ggt", {**ADAM, "weight_decay": 0.1, "weight_decay_mode": "l2", "momentum": 0.5}),
    "low rank, layer": ("efcp_lowrank_mfac", {**ADAM, "scope": "layer", "centered": True, "damping": 1e-4}),
    "low rank, residual": ("efcp_lowrank_mfac", {**ADAM, "residual": "momentum"}),
    "sparse, residual": ("efcp_sparse_ggt", {**ADAM, "residual": "momentum", "scope": "layer"}),
    "low rank, diagonal": ("efcp_lowrank_mfac", {**ADAM, "metric": "diagonal"}),
    "low rank, tensor": ("efcp_lowrank_ggt", {**ADAM, "metric": "tensor"}),
    "sparse": ("efcp_sparse_mfac", {**ADAM, "centered": True}),
    "sparse, layer": ("efcp_sparse_ggt", {**ADAM, "scope": "layer"}),
    "sparse, diagonal": ("efcp_sparse_ggt", {**ADAM, "metric": "diagonal"}),
    "dense": ("efcp_dense_ggt", ADAM),
    "dense, tensor": ("efcp_dense_mfac", {**ADAM, "metric": "tensor", "rms_mode": "constant"}),
}
EXAMPLES = ["low rank", "sparse, diagonal", "dense, tensor"]


class Parameters(nn.Module):
    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.tensors = nn.ParameterList(torch.randn(s, generator=generator, dtype=torch.float64) for s in SHAPES)


def start(key, placement):
    """A module, its parameters and an optimizer; `placement`: "ddp", "fsdp", "hsdp" (two replicas) or "alone"."""
    module = Parameters()
    if placement in ("fsdp", "hsdp"):
        replicas = {"hsdp": {"replicate": 2}}.get(placement, {})
        mesh = {**replicas, "shard": dist.get_world_size() // (2 if replicas else 1)}
        fully_shard(module, mesh=init_device_mesh("cpu", tuple(mesh.values()), mesh_dim_names=tuple(mesh)))
    params = list(module.parameters())
    name, options = RUNS[key]
    group = dist.group.WORLD if placement == "ddp" else None
    given = {"lr": 0.01, "window_size": M, "metric_beta": 0.9, "process_group": group, **options}
    return module, params, make(name, params, **given)


def set_gradients(params, t):
    """A part of rank 2 that stays, noise, and a little of the parameter; tensors and rows differ in size.

    Two tensors have no gradient in every fourth step, a vector and a matrix have zeros at first, and one step is refused.
    """
    lasting, fresh = torch.Generator().manual_seed(1), torch.Generator().manual_seed(2 + t)
    for i, p in enumerate(params):
        value = full(p)
        rows = len(value) if value.ndim > 1 else 1
        left, right = (torch.randn(*s, generator=lasting, dtype=torch.float64) for s in ((rows, 2), (2, value.numel() // rows)))
        noise = torch.randn(value.shape, generator=fresh, dtype=torch.float64)
        g = (2 * (left @ right).view(value.shape) + noise + 0.1 * value) * 3.0 ** -(i % 4)
        g[: len(g) // 3] *= 10
        g *= t > 2 or i not in (3, 6)
        if t == M + 2 and i == 0:
            g[-1] = torch.nan  # the last process has that row
        g = distribute_tensor(g, p.device_mesh, p.placements) if hasattr(p, "device_mesh") else g
        p.grad = None if i in (0, 2) and t % 4 == i + 1 else g


def train(optimizer, params, begin=0, end=END):
    for t in range(begin, end):
        set_gradients(params, t)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "(?s).*not finite", RuntimeWarning)
            optimizer.step()


def counted(optimizer, params):
    """The numbers in each all-reduce of a step."""
    set_gradients(params, END)
    return all_reduces_of(optimizer.step)


def everything(rank, placement, folder):
    """Everything that the test looks at, of every run: the end, messages, state; and half of some runs in a folder."""
    found = {}
    for key in RUNS:
        module, params, optimizer = start(key, placement)
        before = optimizer.memory_footprint()
        train(optimizer, params, 0, HALF)
        if key in EXAMPLES:
            save(module, optimizer, placement, folder / placement / key)
        train(optimizer, params, HALF)
        end = flat(params)
        state = {(i, n): t.clone() for i, p in enumerate(params) for n, t in optimizer.state[p].items() if "metric" in n}
        shapes = {place: tuple(t.shape) for place, t in state.items()}
        shared = {place: t for place, t in state.items() if place[1] in ("metric_cols", "metric_mean", "metric_count")}
        estimate = optimizer.estimate_footprint(2, placement == "fsdp")
        figures = optimizer.diagnostics()
        if placement == "fsdp":  # collective
            saved = optimizer.state_dict()["state"]
            found[key, "state"] = {(i, n): full(t) for i, e in saved.items() for n, t in e.items() if "metric" in n}
        found[key] = end, before, estimate, shapes, shared, figures, counted(optimizer, params)
    for key in EXAMPLES:  # what one process has saved
        found[key, "resumed"] = resume(key, placement, folder / f"{key} alone")
    return found


def save(module, optimizer, placement, folder):
    if placement == "fsdp":
        states = get_state_dict(module, optimizer)
        dcp.save({"model": states[0], "optimizer": states[1]}, checkpoint_id=folder)
        return
    optimizer.save_shards(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if placement == "alone" or dist.get_rank() == 0:
        torch.save([module.state_dict(), optimizer.state_dict()], folder / "both.pt")
    if placement == "alone":  # for FSDP2
        save(module, optimizer, "fsdp", folder / "dcp")


def resume(key, placement, folder):
    module, params, optimizer = start(key, placement)
    if placement == "fsdp" or not (folder / "both.pt").exists():
        folder = folder / "dcp" if (folder / "dcp").exists() else folder
        states = get_state_dict(module, optimizer)
        parts = {"model": states[0], "optimizer": states[1]}
        dcp.load(parts, checkpoint_id=folder)
        set_state_dict(module, optimizer, model_state_dict=parts["model"], optim_state_dict=parts["optimizer"])
    else:
        values, state = torch.load(folder / "both.pt", weights_only=True)
        module.load_state_dict(values)
        optimizer.shard_folder = folder
        optimizer.load_state_dict(state)
    train(optimizer, params, HALF)
    return flat(params)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Each run on one process, and a folder with half of some."""
    folder, found = tmp_path_factory.mktemp("alone"), {}
    for key in RUNS:
        module, params, optimizer = start(key, "alone")
        train(optimizer, params, 0, HALF)
        if key in EXAMPLES:
            save(module, optimizer, "alone", folder / f"{key} alone")
        train(optimizer, params, HALF)
        state = {(i, n): t.clone() for i, p in enumerate(params) for n, t in optimizer.state[p].items() if "metric" in n}
        found[key] = flat(params), state, optimizer.diagnostics()
    return folder, found


@pytest.mark.parametrize("placement", ["ddp", "fsdp"])
def test_two_processes_are_one(placement, alone):
    folder, expected = alone
    everybody = run(2, everything, placement, folder)
    for key, (end, state, figures) in expected.items():
        first, second = (found[key] for found in everybody)
        assert torch.equal(first[0], second[0]), key
        assert relative(first[0], end) <= 1e-9, key
        assert figures["skipped_steps"] == first[5]["skipped_steps"] == 1
        for name in ("row_norm", "update_rms", "kappa"):
            assert first[5][name] == pytest.approx(figures[name], rel=1e-6), (key, name)

        # The fullest process holds what was estimated.
        assert first[2] == second[2] == max((first[1], second[1]), key=lambda kinds: sum(kinds.values())), key
        # What follows no rows is the same on both, bit for bit, and the same as on one process.
        for place in first[4].keys() & second[4].keys():
            assert torch.equal(first[4][place], second[4][place]), (key, place)
        for place, t in (first[4] | second[4]).items():
            torch.testing.assert_close(t, state[place], rtol=1e-9, atol=0)
        if placement == "fsdp":
            for found in everybody:
                for place, t in found[key, "state"].items():
                    torch.testing.assert_close(t, state[place], rtol=1e-9, atol=0)
    for key in EXAMPLES:
        for found in everybody:
            assert relative(found[key, "resumed"], expected[key][0]) <= 1e-9, key
        assert relative(resume(key, "alone", folder / placement / key), expected[key][0]) <= 1e-9, key

    shapes = everybody[0]["low rank"][3], everybody[1]["low rank"][3]
    rows = [[mine.get((i, "metric_rows")) for mine in shapes] for i in range(len(SHAPES))]
    if placement == "fsdp":
        assert rows[0] == [(65,), (65,)] and rows[4] == [(3,), (2,)] and rows[5] == [(1,), (0,)]
        assert [mine[3, "metric_values"] for mine in shapes] == [(1, 4), (1, 3)]
    else:
        assert rows[0][0] != (130,) and sum(r[0] for r in rows[0]) == 130
        assert all(
            sorted(map(str, r)) == sorted(("None", str((SHAPES[i][0],)))) for i, r in enumerate(rows) if i in (1, 2, 4, 5, 6)
        )
    _check_messages(placement, {key: everybody[0][key][6] for key in RUNS})


def _check_messages(placement, sent):
    """One all-reduce; tensor: one more for each shape that is divided, of one number a tensor."""
    divided = [(12, 1, 2), (10, 2, 2), (7, 1, 0), (6, 1, 2), (12, 1, 0), (8, 1, 2)] if placement == "fsdp" else [(12, 1, 2)]
    columns = sum(n * (1 if cols == 7 else cols) for cols, n, _ in divided)
    assert sent["sparse"] == sent["dense"] == [M + 2 + columns]
    assert sent["sparse, diagonal"] == [M + 2 + sum(n for _, n, _ in divided)]
    assert sorted(sent["dense, tensor"]) == sorted([M + 2, *(n for _, n, _ in divided)])
    of_low_rank = [n * numbers for cols, n, rank in divided if rank for numbers in (rank**2, rank**2, cols * rank)]
    assert sorted(sent["low rank"]) == sorted([M + 2 + columns, *of_low_rank])


def with_replicas(rank):
    found = {}
    for key in EXAMPLES:
        _, params, optimizer = start(key, "hsdp")
        train(optimizer, params)
        found[key] = flat(params)
    return found


def test_replicas_of_shards(alone):
    """HSDP sums over the shards only, and the replicas stay equal to the last bit."""
    everybody = run(4, with_replicas)
    for key in EXAMPLES:
        for found in everybody:
            assert torch.equal(found[key], everybody[0][key]), key
        assert relative(everybody[0][key], alone[1][key][0]) <= 1e-9, key
