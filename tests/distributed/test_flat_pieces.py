"""Parameters, gradients and state divided by somebody else, as ZeRO-1 and 2 do: flat pieces, and K summed over them."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn

from hf_efcp import OptionError
from tests.distributed.processes import run
from tests.distributed.test_sharding import flat, gradients, problem
from tests.optim.helpers import differences, snapshot
from tests.reference import info, make, relative

NAMES = ["efcp_dense_mfac", "efcp_dense_ggt", "efcp_sparse_mfac", "efcp_sparse_ggt"]
STEPS, BLOCK = 14, 16
OPTIONS = {"lr": 0.01, "window_size": 6, "update_rms": 0.3, "momentum": 0.5, "weight_decay": 0.1}
VARIANTS = [{}, {"weight_decay_mode": "l2", "window_momentum": 0.5}]
METRIC = {"metric": "tensor", "metric_beta": 0.9, "window_momentum": 0.9, "window_nesterov": True, "rms_mode": "adam"}


def parts_of(params, own):
    """The places in a piece, a slice of all numbers, of each parameter's part."""
    parts, start = [], -own.start
    for p in params:
        part = slice(max(0, start), min(start + p.numel(), own.stop - own.start))
        parts += [part] if part.start < part.stop else []
        start += p.numel()
    return parts


class Zero:
    """What DeepSpeed's ZeRO optimizer does to an optimizer of one group, with pieces that end where blocks do."""

    def __init__(self, name, processes, rank, **options):
        self.params = problem()
        sparse = {"block_size": BLOCK, "density": 0.2} if info(name).compression == "sparse" else {}
        self.optimizer = make(name, self.params, **OPTIONS, **sparse, **options)
        total = sum(p.numel() for p in self.params)
        self.size = -(-total // (4 * BLOCK)) * 4 * BLOCK // processes  # 4: the most processes of these tests
        self.processes, self.padding = processes, self.size * processes - total
        self.own = slice(rank * self.size, (rank + 1) * self.size)
        self.optimizer.take_flat_pieces(total, parts_of(self.params, self.own))
        self.piece = self._flatten(self.params)[self.own].clone().requires_grad_()
        self.optimizer.param_groups[0]["params"] = [self.piece]

    def _flatten(self, tensors):
        return torch.cat([*(t.detach().flatten() for t in tensors), torch.zeros(self.padding, dtype=torch.float64)])

    def step(self, number):
        gradients(self.params, number)
        self.piece.grad = self._flatten([p.grad for p in self.params])[self.own].clone()
        self.optimizer.step()
        pieces = [torch.empty_like(self.piece.detach()) for _ in range(self.processes)]
        dist.all_gather(pieces, self.piece.detach())
        start = 0
        for p in self.params:
            p.data.copy_(torch.cat(pieces)[start : start + p.numel()].view(p.shape))
            start += p.numel()


def train(rank, processes):
    found = {}
    for name in NAMES:
        for i, options in enumerate(VARIANTS):
            zero = Zero(name, processes, rank, **options)
            for step in range(STEPS):
                zero.step(step)
            found[name, i] = flat(zero.params), zero.optimizer.memory_footprint(), zero.optimizer.diagnostics()
    return found


def resume(rank, processes):
    """Each process's state_dict has its own state, and goes on bit for bit; what is not finite on one is skipped by all."""
    for name, options in zip(NAMES, [METRIC, {}, {}, METRIC], strict=True):
        zero, again = (Zero(name, processes, rank, **options) for _ in range(2))
        for step in range(8):
            zero.step(step)
        again.optimizer.load_state_dict(copy.deepcopy(zero.optimizer.state_dict()))
        with torch.no_grad():
            again.piece.copy_(zero.piece)
            for p, value in zip(again.params, zero.params, strict=True):
                p.copy_(value)
        for step in range(8, 12):
            zero.step(step)
            again.step(step)
        assert differences(snapshot(zero.optimizer, [zero.piece]), snapshot(again.optimizer, [again.piece])) == []
        before = zero.piece.detach().clone()
        zero.piece.grad = torch.full_like(before, torch.nan if rank else 1.0)
        with pytest.warns(RuntimeWarning, match="not finite"):
            zero.optimizer.step()
        assert torch.equal(zero.piece, before)


def train_with_metric(rank, processes):
    found = {}
    for name in NAMES[:2]:
        zero = Zero(name, processes, rank, **METRIC)
        for step in range(STEPS):
            zero.step(step)
        parts = parts_of(zero.params, zero.own)
        state = zero.optimizer.state[zero.piece]
        assert state["metric_mean"].shape == state["metric_count"].shape == (len(parts),)
        found[name] = flat(zero.params), [slice(zero.own.start + p.start, zero.own.start + p.stop) for p in parts]
    return found


def train_and_resume(rank, processes):
    resume(rank, processes)
    return train(rank, processes), train_with_metric(rank, processes)


@pytest.fixture(scope="module")
def on_one_process(tmp_path_factory):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path_factory.mktemp('group')}/store", rank=0, world_size=1)
    yield train(0, 1)
    dist.destroy_process_group()


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_the_parameters_are_those_of_one_process(processes, on_one_process):
    both = run(processes, train_and_resume, processes)
    _check_metric([found for _, found in both])
    everybody = [found for found, _ in both]
    for key, (expected, whole, figures) in on_one_process.items():
        for found in everybody:
            assert torch.equal(found[key][0], everybody[0][key][0])
            assert found[key][1]["window"] * processes == whole["window"]
        assert relative(everybody[0][key][0], expected) <= 1e-9, key
        for name in ("row_norm", "update_rms", "kappa", "cosine_rows"):
            assert everybody[0][key][2][name] == pytest.approx(figures[name], rel=1e-6), (key, name)


def _check_metric(everybody):
    """On one process with every part a parameter of its own, the run is the same."""
    for name, (end, _) in everybody[0].items():
        params, parts = problem(), [part for found in everybody for part in found[name][1]]
        assert len(parts) > len(params)  # a parameter in two pieces has a D in each
        pieces = [nn.Parameter(flat(params)[part]) for part in parts]
        optimizer = make(name, pieces, **OPTIONS, **METRIC)
        for step in range(STEPS):
            gradients(params, step)
            g = torch.cat([p.grad.flatten() for p in params])
            for piece, part in zip(pieces, parts, strict=True):
                piece.grad = g[part].clone()
            optimizer.step()
            values = flat(pieces).split([p.numel() for p in params])
            for p, value in zip(params, values, strict=True):
                p.data.copy_(value.view(p.shape))
        for found in everybody:
            assert torch.equal(found[name][0], end)
        assert relative(end, flat(params)) <= 1e-9, name


def test_a_metric_needs_to_know_the_parts():
    for metric, message in (("tensor", "was not told which part"), ("factored", "these are flat pieces: use tensor")):
        params = problem()
        optimizer = make("efcp_dense_mfac", params, lr=0.01, metric=metric)
        optimizer.take_flat_pieces(flat(params).numel())
        optimizer.param_groups[0]["params"] = [flat(params).requires_grad_()]
        with pytest.raises(OptionError, match=message):
            optimizer.memory_footprint()


@pytest.mark.parametrize("name", NAMES[:2])
def test_dense_pieces_are_the_model(name, on_one_process):
    """Flat or not, a dense row has the same inner products; padding counts nowhere."""
    for i, options in enumerate(VARIANTS):
        params = problem()
        optimizer = make(name, params, **OPTIONS, **options)
        for step in range(STEPS):
            gradients(params, step)
            optimizer.step()
        assert relative(on_one_process[name, i][0], flat(params)) <= 1e-9


def test_a_plain_tensor_in_the_place_of_a_parameter_is_refused():
    params = problem()
    optimizer = make("efcp_dense_mfac", params, lr=0.01)
    piece = flat(params).requires_grad_()
    optimizer.param_groups[0]["params"] = [piece]
    piece.grad = torch.ones_like(piece)
    with pytest.raises(OptionError, match=r"was given parameters, and finds a plain tensor \(\d+,\) in their place"):
        optimizer.step()


@pytest.mark.parametrize("given", [torch.ones(3), [torch.ones(3)], [("a", torch.ones(3))]])
def test_plain_tensors_that_were_given_are_trained(given):
    p = given if isinstance(given, torch.Tensor) else given[0][1] if isinstance(given[0], tuple) else given[0]
    p.requires_grad_()
    optimizer = make("efcp_dense_mfac", given if isinstance(given, list) else [given], lr=0.01)
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert (p < 1).all()


def test_a_parameter_of_zero_3_is_refused():
    p = nn.Parameter(torch.empty(0))
    p.ds_id = 0
    with pytest.raises(OptionError, match="ZeRO-3 divides them: use DDP or FSDP2"):
        make("efcp_sparse_mfac", [p], lr=0.01)
