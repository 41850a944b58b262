"""Tensors of one shape are one batch, whatever lr and weight decay their groups have; the numbers are those of each group."""

import pytest
import torch

from tests.optim.helpers import EVERY, M, differences, gradients_at, snapshot, through_a_file, train
from tests.reference import make, parameters

SHAPES = [(12, 30)] * 4 + [(7,)] * 3
# Of a group each: rates and decays that differ, and some that are equal.
NUMBERS = [(0.02, 0.0), (0.01, 0.3), (0.01, 0.0), (0.0, 0.1), (0.02, 0.2), (0.01, 0.2), (0.01, 0.2)]
VARIANTS = [
    {},
    {"momentum": 0.5, "scope": "layer"},
    {"weight_decay_mode": "l2", "window_momentum": 0.5, "metric": "factored", "residual": "momentum"},
    {"window_format": "low_bit", "error_format": "int8", "metric": "diagonal"},
]


def groups_of(params, apart=False):
    """A group for each parameter; `apart`: each of a kind of its own, which keeps the batches apart."""
    return [
        {"params": [p], "lr": lr, "weight_decay": wd, **({"kind": f"kind {i}"} if apart else {})}
        for i, (p, (lr, wd)) in enumerate(zip(params, NUMBERS, strict=True))
    ]


def built(name, apart=False, dtype=torch.float64, **options):
    params = parameters(SHAPES, dtype)
    return make(name, groups_of(params, apart), window_size=M, update_rms=0.1, **options), params


@pytest.mark.parametrize("options", VARIANTS, ids=lambda o: ",".join(map(str, o.values())) or "plain")
@EVERY
def test_one_batch_trains_as_groups_apart_do(name, options):
    """With rates that a schedule changes, and a tensor that has no gradient for a while."""
    ends, stacks = [], []
    for apart in (False, True):
        optimizer, params = built(name, apart, **options)
        for t in range(M + 3):
            gradients_at(t, params)
            params[1].grad = None if t == 2 else params[1].grad
            optimizer.param_groups[2]["lr"] = 0.01 + 0.001 * t
            optimizer.step()
        ends.append(torch.cat([p.detach().flatten() for p in params]))
        stacks.append(len(optimizer.setup().stacks))
    assert stacks == [2, len(SHAPES)]
    torch.testing.assert_close(*ends, rtol=1e-7, atol=1e-9)


@EVERY
def test_parameters_in_few_bits_are_rounded_once(name):
    """p <- (1 - lr*wd) p - lr u in one rounding: with a decay and no gradient to speak of, that of the product."""
    optimizer, params = built(name, dtype=torch.bfloat16)
    for group, lr in zip(optimizer.param_groups, (0.5, 0.25, 0.125, 0.5, 0.5, 0.25, 0.125), strict=True):
        group.update(lr=lr, weight_decay=0.5)
    before = [p.detach().float() for p in params]
    for p in params:
        p.grad = torch.zeros_like(p)
    params[0].grad[0, 0] = 1.0  # a step on nothing but zeros only allocates
    optimizer.step()
    for p, b, group in list(zip(params, before, optimizer.param_groups, strict=True))[1:]:
        assert torch.equal(p.detach(), (b * (1 - group["lr"] * 0.5)).to(p.dtype))


@EVERY
def test_a_run_of_many_groups_resumes_bit_for_bit(name):
    optimizer, params = built(name, dtype=torch.float32)
    train(optimizer, params, 0, M)
    resumed, others = built(name, dtype=torch.float32)
    with torch.no_grad():
        for p, q in zip(params, others, strict=True):
            q.copy_(p)
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    for run, its in ((optimizer, params), (resumed, others)):
        train(run, its, M, 2 * M)
    assert not differences(snapshot(optimizer, params), snapshot(resumed, others))


@EVERY
def test_a_group_that_joins_meets_the_others_in_their_batch(name):
    optimizer, params = built(name)
    train(optimizer, params, 0, 2)
    kept = {k: v for k, v in snapshot(optimizer, params).items() if k.startswith("state")}
    optimizer.add_param_group({"params": parameters([(12, 30)], seed=5), "lr": 0.5})
    setup = optimizer.setup()
    assert [len(s.pieces) for s in setup.stacks] == [5, 3]
    after = snapshot(optimizer, params)
    assert not differences(kept, {k: after.get(k) for k in kept})


@EVERY
def test_a_group_that_is_not_compressed_stays_apart(name):
    params = parameters([(12, 30)] * 2)
    optimizer = make(name, [{"params": params[:1]}, {"params": params[1:], "compress": False}], lr=0.01, window_size=M)
    assert len(optimizer.setup().stacks) == 2
