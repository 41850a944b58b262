"""Two gloo processes: what travels, what is equal afterwards, what a checkpoint gives back."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from hf_efcp.local import LocalUpdates, LoRDO
from tests.distributed.processes import run
from tests.local.runs import flat, model, optimizer_of, train
from tests.reference import relative


class Counted:
    """Counts the bytes that this process gives to the collectives of torch.distributed."""

    def __init__(self):
        self.bytes, self._all_reduce, self._broadcast = 0, dist.all_reduce, dist.broadcast
        dist.all_reduce = self._counting(dist.all_reduce, lambda src: True)
        dist.broadcast = self._counting(dist.broadcast, lambda src: src == dist.get_rank())

    def _counting(self, function, mine):
        def call(t, *args, src=None, **kwargs):
            self.bytes += t.nbytes if mine(src) else 0
            return function(t, *args, **kwargs) if src is None else function(t, src, *args, **kwargs)

        return call

    def end(self):
        dist.all_reduce, dist.broadcast = self._all_reduce, self._broadcast
        return self.bytes


def projector(net, optimizer):
    return optimizer.state[net[0].weight]["projector"].clone()


def lordo_rounds(rank):
    """Weights and Q before and after a synchronisation of DDP's model; gradients of the last step; bytes, counted twice."""
    net, counter = model(), Counted()
    wrapped = DistributedDataParallel(net)
    optimizer = optimizer_of("lordo", net)
    local = LocalUpdates(None, wrapped, optimizer, sync_every=3)
    found = {"start": flat(net)}
    train(wrapped, optimizer, 2, rank)
    found["between"], found["first"] = flat(net), projector(net, optimizer)
    train(wrapped, optimizer, 1, rank, start=2)
    found["gradient"] = net[0].weight.grad.clone()
    found["after"], found["second"] = flat(net), projector(net, optimizer)
    train(wrapped, optimizer, 6, rank, start=3)
    found["moments"] = optimizer.state[net[0].weight]["exp_avg"].clone()
    found["own"] = optimizer.state[net[0].bias]["exp_avg"].clone()
    found["bytes"], found["counted"], found["rounds"] = local.bytes_sent, counter.end(), local.rounds
    local.detach()
    train(wrapped, optimizer, 1, rank, start=9)
    found["reduced"] = net[0].weight.grad.clone()
    return found


def means(rank):
    """A round of AdamW by plain averaging, and one of DiLoCo's, beside this worker alone."""
    found = {}
    for name, options in {"average": {}, "diloco": {"outer_lr": 0.7, "outer_momentum": 0.9}}.items():
        net, alone = model(), model()
        optimizer, by_itself = optimizer_of("adamw", net), optimizer_of("adamw", alone)
        local = LocalUpdates(None, net, optimizer, sync_every=4, average_state={"exp_avg": 1}, **options)
        train(net, optimizer, 4, rank)
        train(alone, by_itself, 4, rank)
        found[name] = flat(net)
        found["alone"], found["m"] = flat(alone), by_itself.state[alone[0].weight]["exp_avg"]
        found["mean m"] = optimizer.state[net[0].weight]["exp_avg"].clone()
        assert local.steps == 0
    return found


def identical_data(rank):
    """LoRDO at K = 1 where both workers see the same."""
    net = model()
    optimizer = optimizer_of("lordo", net)
    LocalUpdates(None, net, optimizer, sync_every=1)
    train(net, optimizer, 6, rank=0)
    return flat(net)


def quadratic(rank, omega):
    """|theta - target_j|^2 / 2, whose mean over both workers has its minimum at the mean target; what is left outside of Q_0."""
    p = torch.nn.Parameter(torch.zeros(10, 7, dtype=torch.float64))
    target = torch.randn(10, 7, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)
    mean = sum(torch.randn(10, 7, generator=torch.Generator().manual_seed(r), dtype=torch.float64) for r in range(2)) / 2
    net = torch.nn.ParameterList([p])
    optimizer = LoRDO([p], lr=0.02, rank=2, omega=omega)
    LocalUpdates(None, net, optimizer, sync_every=5)
    first, left = None, []
    for _ in range(60):
        p.grad = p.detach() - target
        optimizer.step()
        first = optimizer.state[p]["projector"].clone() if first is None else first
        rest = p.detach() - mean
        left.append((rest - first @ (first.T @ rest)).norm().item())
    return left


def resumed(rank, folder, kind):
    """A run of 12 steps that saves in the middle of a round, and one that goes on from there."""
    net = model()
    optimizer = optimizer_of(kind, net)
    local = LocalUpdates(None, net, optimizer, sync_every=4, outer_lr=0.9, outer_momentum=0.5)
    train(net, optimizer, 6, rank)
    local.save(folder)
    weights = copy.deepcopy(net.state_dict())
    train(net, optimizer, 6, rank, start=6)
    other = model(seed=1)
    other.load_state_dict(weights)
    again = optimizer_of(kind, other)
    LocalUpdates(None, other, again, sync_every=4, outer_lr=0.9, outer_momentum=0.5).load(folder)
    train(other, again, 6, rank, start=6)
    if rank == 0:
        torch.save(weights, folder / "weights.pt")
    return flat(net), flat(other)


def everything(rank, folder):
    return {
        "lordo": lordo_rounds(rank),
        "means": means(rank),
        "identical": identical_data(rank),
        "stays": quadratic(rank, 1.0),
        "leaves": quadratic(rank, 0.5),
        "resumed": {k: resumed(rank, folder / k, k) for k in ("lordo", "adamw", "efcp_lowrank_mfac", "efcp_ldadamw")},
    }


@pytest.fixture(scope="module")
def workers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("local")
    return *run(2, everything, folder), folder


def test_equal_after_a_synchronisation_and_different_between(workers):
    a, b = (found["lordo"] for found in workers[:2])
    assert torch.equal(a["start"], b["start"]) and torch.equal(a["first"], b["first"])
    assert not torch.allclose(a["between"], b["between"]) and not torch.allclose(a["gradient"], b["gradient"])
    assert torch.equal(a["after"], b["after"]) and torch.equal(a["second"], b["second"])
    assert not torch.allclose(a["first"], a["second"])
    assert torch.equal(a["moments"], b["moments"])  # in the third round their means are taken
    assert not torch.allclose(a["own"], b["own"])  # AdamW's are each worker's own
    assert torch.equal(a["reduced"], b["reduced"])  # detached: DDP again


def test_the_bytes_are_those_of_the_messages(workers):
    numel, r, rows = sum(p.numel() for p in model().parameters()), 3, (16, 3)
    for worker in workers[:2]:
        found = worker["lordo"]
        assert found["rounds"] == 3
        assert found["bytes"] == found["counted"]
    first = 16 * 12  # the first gradient of the one matrix that is projected: the other has no more rows than r
    moments = r * 12
    expected = [8 * (3 * numel + first + moments), 0]
    bases = [8 * 4 * rows[0] * r, 0]  # the first worker computes and sends it, at the start and three times
    assert workers[0]["lordo"]["bytes"] == expected[0] + bases[0]
    assert workers[1]["lordo"]["bytes"] == expected[0]


def test_the_mean_is_taken(workers):
    a, b = (found["means"] for found in workers[:2])
    start = flat(model())
    mean = (a["alone"] + b["alone"]) / 2
    assert relative(a["average"], mean) < 1e-14
    delta = mean - start
    assert relative(a["diloco"], start + 0.7 * (delta + 0.9 * delta)) < 1e-14
    assert relative(a["mean m"], (a["m"] + b["m"]) / 2) < 1e-14


def test_identical_data_train_as_one_worker(workers):
    net = model()
    train(net, optimizer := optimizer_of("lordo", net), 0)
    LocalUpdates(None, net, optimizer, sync_every=1)
    train(net, optimizer, 6)
    assert relative(workers[0]["identical"], flat(net)) < 1e-9


def test_on_a_quadratic_omega_1_never_reduces_what_lies_outside_of_the_first_subspace(workers):
    for worker in workers[:2]:
        stays, leaves = worker["stays"], worker["leaves"]
        assert max(stays) - min(stays) < 1e-12 * stays[0]
        assert leaves[-1] < 0.9 * leaves[0]


@pytest.mark.parametrize("kind", ["lordo", "adamw", "efcp_lowrank_mfac", "efcp_ldadamw"])
def test_two_workers_go_on_bit_for_bit(workers, kind):
    for worker in workers[:2]:
        uninterrupted, again = worker["resumed"][kind]
        assert torch.equal(uninterrupted, again)


@pytest.mark.parametrize("kind", ["lordo", "adamw"])
def test_one_worker_goes_on_from_two(workers, kind):
    folder = workers[2] / kind
    net = model(seed=1)
    net.load_state_dict(torch.load(folder / "weights.pt", weights_only=True))
    optimizer = optimizer_of(kind, net)
    periods = {"exp_avg": 1, "exp_avg_sq": 1}
    local = LocalUpdates(None, net, optimizer, sync_every=4, average_state=periods, outer_momentum=0.5)
    local.load(folder)
    states = [torch.load(folder / f"local_updates/worker_{j}.pt", weights_only=True)["state"] for j in range(2)]
    for i, p in enumerate(net.parameters()):
        for name in periods:
            number = (
                i
                if kind == "adamw"
                else next(n for n, q in enumerate(q for g in optimizer.param_groups for q in g["params"]) if q is p)
            )
            assert relative(optimizer.state[p][name], (states[0][number][name] + states[1][number][name]) / 2) < 1e-14
    assert local.rounds == 2
    train(net, optimizer, 6, start=6)
    assert torch.isfinite(flat(net)).all()
