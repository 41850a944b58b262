"""comm="factors": the same run as with gradients, of which no process sends one."""

import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import hf_efcp
from hf_efcp import OptionError
from hf_efcp.distributed import factors
from tests.distributed.factor_runs import RANK, M, Net, batch, build, flat, start, train
from tests.distributed.processes import run
from tests.optim.helpers import differences, snapshot
from tests.reference import relative


def trained(name, comm="factors", accumulate=1, **options):
    optimizer, model = start(name, comm, **options)
    train(optimizer, model, accumulate=accumulate)
    return flat(model)


RUNS = {  # what is compared with one process
    ("efcp_lowrank_mfac", "plain"): {},
    ("efcp_lowrank_mfac", "gradients"): {"comm": "gradients"},
    ("efcp_lowrank_mfac", "accumulated"): {"accumulate": 2},
    ("efcp_lowrank_mfac", "l2"): {"momentum": 0.5, "weight_decay": 0.1, "weight_decay_mode": "l2", "window_momentum": 0.5},
    ("efcp_lowrank_ggt", "not sharded"): {"group": False},
    ("efcp_lowrank_ggt", "layer"): {"scope": "layer", "power_iterations": 2, "eps": 1e-2},
}


def everything(rank):
    assert "words.weight: rank 0 rows 0-" in start("efcp_lowrank_mfac")[0].sharding_plan()
    return {key: trained(key[0], **options) for key, options in RUNS.items()}


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_the_run_is_that_of_one_process(processes):
    everybody = run(processes, everything)
    known = {}
    for (name, what), options in RUNS.items():
        for theirs in everybody[1:]:
            assert torch.equal(everybody[0][name, what], theirs[name, what]), what
        alike = {k: v for k, v in options.items() if k not in ("accumulate", "group", "comm")}
        key = (name, *alike)
        known[key] = trained(name, **alike) if key not in known else known[key]
        assert relative(everybody[0][name, what], known[key]) <= 1e-9, what
    # A difference would be seen.
    assert relative(everybody[0]["efcp_lowrank_mfac", "l2"], everybody[0]["efcp_lowrank_mfac", "plain"]) > 1e-3


def wrong(rank):
    """Each process compresses its own, and the factors are averaged."""

    def local(a, q, power_iterations, mean_, plain=()):
        found = factors.factors_of_mean(a, q, power_iterations, lambda tensors: None)
        mean_([*(t for pair in found for t in pair), *plain])
        return found

    from hf_efcp.engine import factor_sync

    factor_sync.factors_of_mean = local
    return trained("efcp_lowrank_mfac", "factors")


def test_averaged_local_factors_are_another_run():
    first, _ = run(2, wrong)
    assert relative(first, trained("efcp_lowrank_mfac", "gradients")) > 1e-3


def exact(rank, a):
    """P Q^T of the mean, and the mean of the errors."""
    q = torch.ones(1, 9, 2, dtype=torch.float64)
    q[:, :4, 1] = -1
    mine = a[rank][None]
    ((p, q),) = factors.factors_of_mean([mine], [q], 3, lambda tensors: factors.mean_(tensors, dist.group.WORLD, len(a)))
    error = mine - p @ q.mT
    factors.mean_([error], dist.group.WORLD, len(a))
    return (p @ q.mT)[0], error[0]


def test_a_mean_of_low_rank_is_found_though_no_process_has_one():
    generator = torch.Generator().manual_seed(1)
    mean, apart = (
        torch.randn(12, r, generator=generator).double() @ torch.randn(r, 9, generator=generator).double() for r in (2, 9)
    )
    for c, error in run(2, exact, torch.stack([mean + apart, mean - apart])):
        assert relative(c, mean) <= 1e-12
        assert error.norm() <= 1e-12 * apart.norm()


def one_gradient_not_finite(rank):
    optimizer, model = start("efcp_lowrank_mfac", error_dtype="bf16")
    train(optimizer, model, 0, 4)
    params = list(model.parameters())
    before = snapshot(optimizer, params, without=["skipped"])
    optimizer.zero_grad()
    loss = model(batch(4, rank, 2))
    (loss * float("nan") if rank == 1 else loss).backward()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer.step()
    same = differences(before, snapshot(optimizer, params, without=["skipped"]))
    train(optimizer, model, 5, 8)
    return same, optimizer.diagnostics()["skipped_steps"], flat(model)


def test_all_skip_together_and_keep_their_errors():
    first, second = run(2, one_gradient_not_finite)
    assert first[:2] == second[:2] == ([], 1.0)
    assert torch.equal(first[2], second[2])
    assert first[2].isfinite().all()


def messages(rank, group):
    """Numbers of every all-reduce of a step, and the bytes of state."""
    optimizer, model = start("efcp_lowrank_mfac", group=group)
    train(optimizer, model, 0, 2)
    sent, all_reduce = [], dist.all_reduce

    def counted(t, *args, **kwargs):
        sent.append(t.numel())
        return all_reduce(t, *args, **kwargs)

    dist.all_reduce = counted
    train(optimizer, model, 2, 3)
    dist.all_reduce = all_reduce
    return sent, optimizer.memory_footprint()


def messages_of_both(rank):
    return messages(rank, True), messages(rank, False)


def test_what_is_sent_and_held():
    everybody = run(2, messages_of_both)
    net = Net()
    matrices = [p.flatten(1) for p in net.parameters() if p.ndim > 1 and RANK * sum(p.flatten(1).shape) < p.numel()]
    assert len(matrices) == 5
    plain = sum(p.numel() for p in net.parameters()) - sum(p.numel() for p in matrices)
    factors = RANK * sum(sum(p.shape) for p in matrices) + plain
    whole = build("efcp_lowrank_mfac", net).memory_footprint()["window"]
    for sharded, not_sharded in everybody:
        assert sum(not_sharded[0]) == factors < 0.4 * flat(net).numel()
        assert sum(sharded[0]) == factors + M + 1  # the row of K, and whether a process has a doubt
        for _, footprint in (sharded, not_sharded):
            assert footprint["error"] == 8 * sum(p.numel() for p in matrices)
            assert footprint["warm_start"] == 8 * RANK * sum(p.shape[1] for p in matrices)
        assert sharded[1]["window"] <= 0.75 * whole
        assert not_sharded[1]["window"] == whole


def refusals(rank):
    found = {}

    def refused(what, function):
        try:
            function()
        except OptionError as error:
            found[what] = str(error)

    def without_hook():
        model = Net()
        optimizer = build("efcp_lowrank_mfac", model, comm="factors")
        model(batch(0)).backward()
        optimizer.step()

    refused("no hook", without_hook)
    model = Net()
    refused("no DDP", lambda: build("efcp_lowrank_mfac", model, comm="factors").register_comm_hook(model))
    wrapped = DistributedDataParallel(model)
    refused("gradients", lambda: build("efcp_lowrank_mfac", model).register_comm_hook(wrapped))
    refused("sparse", lambda: hf_efcp.SparseMFAC(model.parameters(), lr=0.1).register_comm_hook(wrapped))
    refused("stranger", lambda: build("efcp_lowrank_mfac", Net(), comm="factors").register_comm_hook(wrapped))

    optimizer, model = start("efcp_lowrank_mfac")
    train(optimizer, model, 0, 2)
    with model.no_sync():
        model(batch(2)).backward()
    refused("no_sync", optimizer.step)
    optimizer, model = start("efcp_lowrank_mfac")
    model(batch(2)).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1e-6)
    refused("clipped", optimizer.step)
    return found


def test_misuse_is_refused_on_all_processes():
    messages = {
        "no hook": r"needs its hook on several processes: call optimizer\.register_comm_hook",
        "no DDP": "needs a DistributedDataParallel, got Net",
        "gradients": "this LowRankMFAC has comm='gradients'",
        "sparse": "this SparseMFAC has no option comm",
        "stranger": "13 of the parameters are not in the model",
        "no_sync": "did not come from a backward through the DistributedDataParallel",
        "clipped": "gradients were changed between backward.* take max_grad_norm=0",
    }
    for found in run(2, refusals):
        assert found.keys() == messages.keys()
        for what, text in messages.items():
            with pytest.raises(OptionError, match=text):
                raise OptionError(found[what])


def test_one_process_is_as_ever():
    optimizer, model = start("efcp_lowrank_mfac")
    train(optimizer, model, 0, 3)
    other, plain = start("efcp_lowrank_mfac", "gradients")
    train(other, plain, 0, 3)
    assert torch.equal(flat(model), flat(plain))
    assert "sharded" not in optimizer.state_dict()["efcp"]


def unused(rank):
    """A layer that no process uses, then one that only the first uses."""
    torch.manual_seed(0)
    layers = nn.ModuleList(nn.Linear(12, 12) for _ in range(3)).double()

    class Some(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = layers

        def forward(self, x, used):
            for i in used:
                x = self.layers[i](x)
            return x.square().mean()

    model = Some()
    several = dist.is_initialized()
    optimizer = build("efcp_lowrank_mfac", model, comm="factors", process_group=dist.group.WORLD if several else None)
    if several:
        model = DistributedDataParallel(model, find_unused_parameters=True)
        optimizer.register_comm_hook(model)
    for step in range(12):
        optimizer.zero_grad()
        x = torch.randn(8, 12, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        uses = [[0, 1], [0]] if step % 2 else [[0, 1], [0, 1]]
        if several:
            model(x.chunk(2)[rank], uses[rank]).backward()
        else:
            (sum(model(part, use) for part, use in zip(x.chunk(2), uses, strict=True)) / 2).backward()
        optimizer.step()
    return flat(model)


def test_layers_that_are_not_used_everywhere():
    first, second = run(2, unused)
    assert torch.equal(first, second)
    assert relative(first, unused(0)) <= 1e-9
