"""Several processes, one training run: the state divided, the same parameters."""

import functools

import pytest
import torch
import torch.distributed as dist
from torch import nn

import hf_efcp
from tests.distributed.processes import run
from tests.reference import IN_TURN, info, known_to, make, relative

STEPS = 13  # two windows long, and a step
# The first is larger than all others together: it is divided by rows.
SHAPES = [(130, 12), (12, 10), (10, 12), (7,), (5, 3, 2), (9, 8), (8,), ()]
VARIANTS = [{}, {"scope": "layer"}, {"momentum": 0.5, "weight_decay": 0.1, "window_momentum": 0.5}]


def variants_of(name, chosen=(0, 1, 2)):
    """Those of the variants that are not one another for a method without a scope."""
    return [i for i in chosen if i != 1 or "scope" in info(name).options()]


def problem(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype)) for s in SHAPES]


def gradients(params, step, perturbed=None):
    """The same on every process, as DDP leaves them; they depend on the parameters, so that differences grow.

    `perturbed`: 1 ulp towards that number.
    """
    generator = torch.Generator().manual_seed(step)
    for p in params:
        noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        p.grad = (0.1 * noise + 0.05 * p.detach().double()).to(p.dtype)
        if perturbed is not None:
            p.grad = torch.nextafter(p.grad, torch.full_like(p.grad, perturbed))


def train(optimizer, params, start=0, stop=STEPS, **options):
    for step in range(start, stop):
        gradients(params, step, **options)
        optimizer.step()


def build(name, params, **options):
    return make(name, params, **{"lr": 0.01, "window_size": 6, "update_rms": 0.3, **options})


def flat(params):
    return torch.cat([p.detach().double().flatten() for p in params])


@functools.cache
def on_one_process(name, variant, dtype, perturbed=None):
    """The parameters at the end, with VARIANTS[variant]."""
    params = problem(dtype)
    train(build(name, params, **VARIANTS[variant]), params, perturbed=perturbed)
    return flat(params)


def ulp_apart(name, variant):
    """How far one process gets from itself with fp32 gradients that are 1 ulp off: the largest of three."""
    expected = on_one_process(name, variant, torch.float32)
    return max(relative(on_one_process(name, variant, torch.float32, t), expected) for t in (torch.inf, -torch.inf, 0.0))


def train_everything(rank, dtype):
    results = {}
    for name in IN_TURN:
        for i in variants_of(name):
            variant = VARIANTS[i]
            params = problem(dtype)
            optimizer = build(name, params, process_group=dist.group.WORLD, **variant)
            train(optimizer, params)
            results[name, i] = flat(params), optimizer.sharding_plan()
    return results


@pytest.mark.parametrize(
    ("processes", "dtype"),
    [
        (4, torch.float64),
        *(
            pytest.param(n, dtype, marks=pytest.mark.slow)
            for n, dtype in ((2, torch.float32), (2, torch.float64), (4, torch.float32))
        ),
    ],
    ids=str,
)
def test_the_parameters_are_those_of_one_process(processes, dtype):
    everybody = run(processes, train_everything, dtype)
    for name in IN_TURN:
        for i in variants_of(name):
            variant = VARIANTS[i]
            # All of them amplify rounding; which gets furthest is chance.
            bound = 2 * ulp_apart(name, i) if dtype == torch.float32 else 1e-9
            for theirs in everybody:
                assert torch.equal(theirs[name, i][0], everybody[0][name, i][0])
                assert "parameter 0: rank 0 rows 0-" in theirs[name, i][1]
            assert relative(everybody[0][name, i][0], on_one_process(name, i, dtype)) <= bound, (name, variant)


def footprints(rank):
    found = {}
    for name in IN_TURN:
        model = nn.Sequential(nn.Embedding(3000, 64), *(nn.Linear(64, 64) for _ in range(12)), nn.Linear(64, 256))
        options = {"low rank": {"rank": 4}, "sparse": {"density": 0.01}}.get(info(name).compression, {})
        options = known_to(name, {"lr": 0.1, "window_size": 32, **options})
        optimizer = hf_efcp.create_optimizer(name, model, process_group=dist.group.WORLD, **options)
        found[name] = optimizer.memory_footprint(), optimizer.sharding_plan()
        found[name, "alone"] = hf_efcp.create_optimizer(name, model, **options).memory_footprint()
    return found


@pytest.mark.parametrize("processes", [2, 4])
def test_each_process_holds_its_share(processes):
    everybody = run(processes, footprints)
    for name in IN_TURN:
        total = sum(bytes_ for kind, bytes_ in everybody[0][name, "alone"].items() if kind != "gram")
        for found in everybody:
            held = sum(bytes_ for kind, bytes_ in found[name][0].items() if kind != "gram")
            uneven = 1.4 if "shampoo_beta" in info(name).options() else 1.1  # blocks of 1,000 rows are whole on a process
            assert held <= uneven * total / processes, name
            assert found[name][1] == everybody[0][name][1]


def rank_deficient(rank, kind):
    """The divided tensor's gradient has rank 1, or is zero, for a while: the other columns of Q die and are redrawn."""
    params = problem()
    group = dist.group.WORLD if dist.is_initialized() else None
    optimizer = build("efcp_lowrank_mfac", params, process_group=group, rank=4)
    for step in range(12):
        gradients(params, step)
        if step < 6:
            outer = torch.outer(torch.arange(130.0).double().sin(), torch.arange(12.0).double().cos())
            params[0].grad = outer * (step + 1) if kind == "rank 1" else torch.zeros_like(params[0])
        optimizer.step()
    return flat(params)


@pytest.mark.parametrize("kind", ["rank 1", "zero"])
def test_a_divided_tensor_whose_gradient_has_less_rank(kind):
    first, second = run(2, rank_deficient, kind)
    assert torch.equal(first, second)
    assert relative(first, rank_deficient(0, kind)) <= 1e-9
