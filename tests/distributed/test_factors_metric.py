"""comm="factors" with a metric: D is of the step before, the same on all processes, and of the mean of their squares."""

import warnings

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import hf_efcp
from hf_efcp import OptionError
from tests.distributed.factor_runs import RANK, Net, batch, build, flat, start
from tests.distributed.processes import run
from tests.optim.helpers import differences, snapshot
from tests.reference import relative, row, stack_of

HALF, END = 7, 14
BETA, EPS = 0.9, 1e-3
ADAM = {"metric": "factored", "metric_beta": BETA, "window_momentum": 0.9, "window_nesterov": True, "rms_mode": "adam"}
RUNS = {  # on batches that are the same on both processes
    "sharded": ("efcp_lowrank_mfac", ADAM),
    "not sharded": ("efcp_lowrank_mfac", {**ADAM, "group": False, "momentum": 0.5, "error_dtype": "bf16"}),
    "l2": ("efcp_lowrank_ggt", {**ADAM, "weight_decay": 0.1, "weight_decay_mode": "l2", "accumulate": 2, "eps": 1e-2}),
    "layer": ("efcp_lowrank_mfac", {**ADAM, "scope": "layer", "power_iterations": 2}),
}


def begin(key, group=True):
    name, options = RUNS[key]
    options = {"group": group, **options}
    return start(name, **{k: v for k, v in options.items() if k != "accumulate"})


def backward(model, step, place=(0, 1), parts=1, factor=1.0):
    for part in range(parts):
        loss = model(batch(step, *place, parts, part)) / parts * factor
        if part < parts - 1 and isinstance(model, DistributedDataParallel):
            with model.no_sync():
                loss.backward()
        else:
            loss.backward()


def train(optimizer, model, first=0, end=END, place=(0, 1), **options):
    """By default on the whole batch on every process; gives each step's own gradients."""
    gradients = []
    for step in range(first, end):
        optimizer.zero_grad()
        backward(model, step, place, **options)
        gradients.append([p.grad.clone() for p in model.parameters()])
        optimizer.step()
    return gradients


def parts_of(key):
    return RUNS[key][1].get("accumulate", 1)


def save(optimizer, model, folder):
    optimizer.save_shards(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if not dist.is_initialized() or dist.get_rank() == 0:
        torch.save([optimizer.state_dict(), getattr(model, "module", model).state_dict()], folder / "both.pt")


def resume(folder):
    optimizer, model = begin("sharded")
    state, values = torch.load(folder / "both.pt", weights_only=True)
    getattr(model, "module", model).load_state_dict(values)
    optimizer.shard_folder = folder
    optimizer.load_state_dict(state)
    train(optimizer, model, HALF)
    return flat(model), snapshot(optimizer, list(model.parameters()))


def numbers_sent(optimizer, model, place):
    sent, all_reduce = [], dist.all_reduce
    dist.all_reduce = lambda t, *args, **kwargs: (sent.append(t.numel()), all_reduce(t, *args, **kwargs))[1]
    try:
        train(optimizer, model, END, END + 1, place)
    finally:
        dist.all_reduce = all_reduce
    return sent


def refused_alike(rank):
    """What differs after a step with numbers on process 1 that are not finite, or whose squares are not."""
    found = {}
    for factor in (float("nan"), 1e200):
        optimizer, model = begin("sharded")
        params = list(model.parameters())
        train(optimizer, model, 0, 3, (rank, 2))
        before = snapshot(optimizer, params, without=["skipped"])
        optimizer.zero_grad()
        backward(model, 3, (rank, 2), factor=factor if rank == 1 else 1.0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer.step()
        same = differences(before, snapshot(optimizer, params, without=["skipped"]))
        train(optimizer, model, 4, 6, (rank, 2))
        found[str(factor)] = same, optimizer.diagnostics()["skipped_steps"], flat(model)
    return found


def whitened_apart(rank):
    """A run on halves of the batches whose window has every entry: its gradients, state, entries and bytes."""
    optimizer, model = start("efcp_lowrank_mfac", **{**ADAM, "window_size": END})
    gradients = train(optimizer, model, 0, END, (rank, 2))
    params = list(model.parameters())
    entries = {i: [row(optimizer, p, j) for j in range(END)] for i, p in enumerate(params) if whole(optimizer, p)}
    state = {i: {n: t.clone() for n, t in optimizer.state[p].items()} for i, p in enumerate(params)}
    footprint, estimate = optimizer.memory_footprint(), optimizer.estimate_footprint(2)
    return gradients, state, entries, footprint, estimate, numbers_sent(optimizer, model, (rank, 2))


def whole(optimizer, p):
    """Whether this process has all of p's window."""
    return "window_p" in optimizer.state[p] and stack_of(optimizer, p).total is None


def everything(rank, folder):
    found = {}
    for key in RUNS:
        optimizer, model = begin(key)
        train(optimizer, model, 0, HALF, parts=parts_of(key))
        if key == "sharded":
            save(optimizer, model, folder / "two")
        train(optimizer, model, HALF, END, parts=parts_of(key))
        found[key] = flat(model), snapshot(optimizer, list(model.parameters()))
    found["two resume"] = resume(folder / "two")
    found["of one"] = resume(folder / "one")
    found["refused"] = refused_alike(rank)
    found["apart"] = whitened_apart(rank)
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """What one process and what two have found, and the folder of their checkpoints."""
    folder, alone = tmp_path_factory.mktemp("factors"), {}
    for key in RUNS:
        optimizer, model = begin(key)
        train(optimizer, model, 0, HALF, parts=parts_of(key))
        if key == "sharded":
            save(optimizer, model, folder / "one")
        train(optimizer, model, HALF, END, parts=parts_of(key))
        alone[key] = flat(model), snapshot(optimizer, list(model.parameters()))
    return alone, run(2, everything, folder), folder


def test_equal_gradients_train_as_one_process(runs):
    alone, (first, second), folder = runs
    for key, (expected, state) in alone.items():
        assert torch.equal(first[key][0], second[key][0]), key
        bound = 1e-9 if "error_dtype" not in RUNS[key][1] else 1e-3  # bf16 errors: rounding differs by an ulp, then by a digit
        assert relative(first[key][0], expected) <= bound, key
        for found in (first, second):
            for name in found[key][1]:
                if "metric" in name and bound == 1e-9:
                    torch.testing.assert_close(found[key][1][name], state[name], rtol=1e-8, atol=0)
    expected = alone["sharded"][0]
    assert relative(first["of one"][0], expected) <= 1e-9
    assert relative(resume(folder / "two")[0], expected) <= 1e-9
    for found in (first, second):
        assert torch.equal(found["two resume"][0], found["sharded"][0])
        assert differences(found["two resume"][1], found["sharded"][1]) == []


def test_the_errors_and_entries_are_of_whitened_gradients(runs):
    """Formed again from each process's gradients: D; and the sum of the entries with the mean of the errors, by telescoping."""
    _, everybody, _ = runs
    (mine, state, *_), (theirs, other, *_) = (found["apart"] for found in everybody)
    checked, scaled_down = 0, 0
    for i in state:
        if "warm_start" not in state[i]:
            continue
        for name in ("metric_rows", "metric_cols", "metric_count"):
            assert torch.equal(state[i][name], other[i][name])
        pairs = [torch.stack([a[i], b[i]]).flatten(2) for a, b in zip(mine, theirs, strict=True)]
        r, c, total = torch.zeros(pairs[0].shape[1]).double(), torch.zeros(pairs[0].shape[2]).double(), 0.0
        for k, g in enumerate(pairs):
            if k:
                done = 1 - BETA**k
                mu = c.mean()
                d = ((r + EPS * mu) / done)[:, None] * (c / mu + EPS)
                size = (g.square() / d).mean(2, keepdim=True).sqrt()
                shrink = (1 / (1 - BETA) ** 0.5 / size).clamp_max(1)
                scaled_down += int((shrink < 1).sum())
                total = total + (g * shrink * d**-0.25).mean(0)
            square = g.square().mean(0)
            r, c = BETA * r + (1 - BETA) * square.mean(1), BETA * c + (1 - BETA) * square.mean(0)
        torch.testing.assert_close(state[i]["metric_rows"], r, rtol=1e-11, atol=0)
        torch.testing.assert_close(state[i]["metric_cols"], c, rtol=1e-11, atol=0)
        for found in everybody:
            if i in found["apart"][2]:
                checked += 1
                error = (state[i]["error"] + other[i]["error"]) / 2
                entries = torch.stack(found["apart"][2][i]).sum(0).view(error.flatten(1).shape)
                assert relative((entries + error.flatten(1)).flatten(), total.flatten()) <= 1e-10
    assert checked >= 4 and scaled_down > 20


def test_what_is_sent_and_held(runs):
    _, everybody, _ = runs
    net = Net()
    matrices = [p.flatten(1) for p in net.parameters() if p.ndim > 1 and RANK * sum(p.flatten(1).shape) < p.numel()]
    plain = sum(p.numel() for p in net.parameters()) - sum(p.numel() for p in matrices)
    one = build("efcp_lowrank_mfac", net, **ADAM, window_size=END).memory_footprint()
    footprints = [found["apart"][3] for found in everybody]
    for found, held in zip(everybody, footprints, strict=True):
        _, _, _, _, estimate, sent = found["apart"]
        assert sum(sent) == (RANK + 1) * sum(sum(p.shape) for p in matrices) + plain + END + 2
        assert held["metric"] >= sum(8 * (sum(p.shape) + 1) for p in matrices)
        assert held["metric"] <= one["metric"]
        assert estimate == max(footprints, key=lambda kinds: sum(kinds.values()))


def test_all_refuse_together(runs):
    _, (first, second), _ = runs
    for factor, (same, skipped, end) in first["refused"].items():
        assert (same, skipped) == second["refused"][factor][:2] == ([], 1.0), factor
        assert torch.equal(end, second["refused"][factor][2])
        assert end.isfinite().all()


def test_the_first_gradient_of_a_matrix_is_only_measured():
    optimizer, model = start("efcp_lowrank_mfac", **ADAM)
    params = list(model.parameters())
    before = [p.detach().clone() for p in params]
    train(optimizer, model, 0, 1)
    moved = [not torch.equal(p, b) for p, b in zip(params, before, strict=True)]
    compressed = ["warm_start" in optimizer.state[p] for p in params]
    assert sum(compressed) == 5
    assert moved == [not c for c in compressed]
    train(optimizer, model, 1, 2)
    assert not any(torch.equal(p, b) for p, b in zip(params, before, strict=True))
    # That is the rule of comm=factors alone.
    optimizer, model = start("efcp_lowrank_mfac", "gradients", **ADAM)
    train(optimizer, model, 0, 1)
    assert not any(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("metric", ["diagonal", "tensor"])
def test_other_metrics_are_refused(metric):
    with pytest.raises(OptionError, match=f"metric='{metric}': with comm=factors allowed are none and factored"):
        hf_efcp.LowRankMFAC(Net().parameters(), lr=0.1, comm="factors", metric=metric)
