"""LoRDO's step against dense fp64 numbers made from its specification, without anything of the engine, and its invariants."""

import copy

import pytest
import torch
from torch import nn

from hf_efcp.groups import parameter_groups
from hf_efcp.local import LoRDO
from hf_efcp.local.lordo import joined
from hf_efcp.options import OptionError
from tests.local.runs import flat, model, train
from tests.reference import relative

B1, B2, EPS, LR = 0.9, 0.99, 1e-8, 0.02


def parameter(shape, seed=0):
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))


def gradient(shape, step):
    return torch.randn(shape, generator=torch.Generator().manual_seed(100 + step), dtype=torch.float64)


def build(params, **options):
    return LoRDO(params, **{"lr": LR, "beta1": B1, "beta2": B2, "rank": 3, **options})


def rounds(p, optimizer, count=4, steps=5):
    """Rounds of one worker: steps, then the projection by what they have added."""
    for r in range(count):
        before = p.detach().clone()
        for k in range(steps):
            p.grad = gradient(p.shape, r * steps + k)
            optimizer.step()
        optimizer.turn(optimizer.bases({p: p.detach() - before}))


@pytest.mark.parametrize("shape", [(8, 12), (12, 8)], ids=str)
@pytest.mark.parametrize("bias_correction", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_step_and_a_turn_are_those_of_the_specification(shape, bias_correction, side):
    omega, mu, wd, left = 0.7, 2.0, 0.1, side == "left"
    p = parameter(shape)
    optimizer = build([p], omega=omega, mu=mu, weight_decay=wd, bias_correction=bias_correction, proj_type=side)
    w, e = p.detach().clone(), torch.zeros(shape, dtype=torch.float64)
    turned = (lambda x: x) if left else (lambda x: x.T)
    w, e = turned(w), turned(e)
    q, u, v, t = None, 0, 0, 0
    for r in range(3):
        start = w.clone()
        for k in range(4):
            g = turned(gradient(shape, 4 * r + k))
            p.grad = turned(g).clone()
            optimizer.step()
            q = torch.linalg.svd(g)[0][:, :3] if q is None else q
            before, t = g + e, t + 1
            h = q.T @ before
            e = before - q @ h
            u, v = B1 * u + (1 - B1) * h, B2 * v + (1 - B2) * h**2
            c1, c2 = (1 - B1**t, 1 - B2**t) if bias_correction else (1, 1)
            d = (v / c2).mean(0, keepdim=True).sqrt() + EPS
            w = (1 - LR * wd) * w - LR * ((1 - omega) * g / (mu * d) + omega * q @ ((u / c1) / ((v / c2).sqrt() + EPS)))
            state = optimizer.state[p]
            assert relative(turned(p.detach()), w) < 1e-12
            assert torch.linalg.norm(turned(state["error"]) - e) < 1e-12
            kept = state["projector"] @ (state["projector"].T @ before)
            assert torch.linalg.norm(turned(state["error"]) + kept - before) < 1e-12  # E + Q h = G + E before
        delta = w - start
        optimizer.turn(optimizer.bases({p: turned(delta)}))
        new = torch.linalg.svd(delta)[0][:, :3]
        by = new.T @ q
        c1, c2 = (1 - B1**t, 1 - B2**t) if bias_correction else (1, 1)
        shares = 1 - (by**2).sum(1, keepdim=True)
        v = c2 * (by**2 @ (v / c2 - (u / c1) ** 2) + (by @ u / c1) ** 2).abs() + shares * v.mean(0, keepdim=True)
        u, q = by @ u, new
        signs = (state["projector"] * q).sum(0).sign()
        assert relative(state["projector"] * signs, q) < 1e-10
        assert relative(state["exp_avg"] * signs[:, None], u) < 1e-10
        assert relative(state["exp_avg_sq"], v) < 1e-10 and state["exp_avg_sq"].min() >= 0


def angle(a, b):
    return (torch.linalg.svdvals(a.T @ b).min() - 1).abs().item()


@pytest.mark.parametrize("method", ["svd", "power_iteration"])
def test_with_omega_1_nothing_leaves_the_first_subspace(method):
    """The paper's stagnation: every update, hence every pseudo-gradient, lies in the span of Q."""
    p = parameter((9, 14))
    start, optimizer = p.detach().clone(), build([p], omega=1.0, proj_method=method)
    rounds(p, optimizer, 1)
    first = optimizer.state[p]["projector"].clone()
    rounds(p, optimizer, 6)
    assert torch.linalg.matrix_rank(p.detach() - start, rtol=1e-10) == 3
    assert angle(first, optimizer.state[p]["projector"]) < 1e-12


def test_with_omega_below_1_the_subspace_turns_and_the_rank_grows():
    p = parameter((9, 14))
    start, optimizer = p.detach().clone(), build([p], omega=0.9)
    rounds(p, optimizer, 1)
    first = optimizer.state[p]["projector"].clone()
    rounds(p, optimizer, 6)
    assert torch.linalg.matrix_rank(p.detach() - start, rtol=1e-10) == 9
    assert angle(first, optimizer.state[p]["projector"]) > 1e-2


@pytest.mark.parametrize("bias_correction", [True, False])
def test_at_full_rank_and_omega_1_it_is_adam(bias_correction):
    p, other = parameter((6, 9)), parameter((6, 9))
    optimizer = build([p], rank=100, omega=1.0, bias_correction=bias_correction, weight_decay=0.1)
    theirs = torch.optim.AdamW([other], lr=LR, betas=(B1, B2), eps=EPS, weight_decay=0.1)
    m = v = 0
    for step in range(20):
        p.grad = other.grad = gradient((6, 9), step)
        if not bias_correction:
            m, v = B1 * m + (1 - B1) * p.grad, B2 * v + (1 - B2) * p.grad**2
            with torch.no_grad():
                other.mul_(1 - LR * 0.1).sub_(LR * m / (v.sqrt() + EPS))
        else:
            theirs.step()
        optimizer.step()
        assert relative(p.detach(), other.detach()) < 1e-12
    assert optimizer.projected() == []
    assert torch.equal(optimizer.state[p]["projector"], torch.eye(6, dtype=torch.float64))


def test_a_pseudo_gradient_of_less_rank_keeps_old_directions():
    q0 = torch.linalg.qr(gradient((8, 3), 0)).Q
    one = gradient((8, 1), 1) @ gradient((1, 3), 2)
    q = joined(one, q0)
    assert torch.linalg.norm(q.T @ q - torch.eye(3, dtype=torch.float64)) < 1e-12
    spanned = torch.linalg.qr(torch.cat([q0, one[:, :1]], 1)).Q
    assert torch.linalg.norm(q - spanned @ (spanned.T @ q)) < 1e-12
    assert torch.linalg.norm(one - q @ (q.T @ one)) < 1e-12
    assert angle(joined(torch.zeros(8, 3, dtype=torch.float64), q0), q0) < 1e-12


def test_the_error_is_kept_or_not():
    p = parameter((8, 12))
    for kept in (1.0, 0.5, 0.0):
        optimizer = build([p], error_kept=kept)
        p.grad = gradient((8, 12), 0)
        optimizer.step()
        error = optimizer.state[p]["error"].clone()
        assert error.norm() > 0.1
        optimizer.turn(optimizer.bases({p: gradient((8, 12), 1)}))
        assert torch.equal(optimizer.state[p]["error"], kept * error)
    assert "error" not in build([p], error_feedback=False).memory_footprint()


def test_embeddings_heads_and_vectors_have_adamw():
    net = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 6)).double()
    optimizer = LoRDO(parameter_groups(net), lr=LR, rank=2)
    loss = net(torch.arange(5)).square().sum()
    loss.backward()
    optimizer.step()
    assert [set(optimizer.state[p]) & {"projector", "exp_avg"} for p in net.parameters()] == [
        {"exp_avg"},
        {"projector", "exp_avg"},
        {"exp_avg"},
    ]
    assert optimizer.projected() == [net[1].weight]


@pytest.mark.parametrize("options", [{}, {"error_dtype": "bf16"}, {"error_format": "int8"}, {"error_feedback": False}], ids=str)
def test_it_goes_on_bit_for_bit(options, tmp_path):
    net = model(dtype=torch.float32)
    optimizer = LoRDO(parameter_groups(net), lr=LR, rank=3, preset="measured", **options)
    train(net, optimizer, 4, dtype=torch.float32)
    optimizer.turn(optimizer.bases({p: p.detach() for p in optimizer.projected()}))
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    other = copy.deepcopy(net)
    again = LoRDO(parameter_groups(other), lr=LR, rank=3, preset="measured", **options)
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for n, o in ((net, optimizer), (other, again)):
        train(n, o, 2, start=4, dtype=torch.float32)
        o.turn(o.bases({p: p.detach() for p in o.projected()}))
        train(n, o, 2, start=6, dtype=torch.float32)
    assert torch.equal(flat(net), flat(other))


def test_the_first_projection_is_drawn_if_asked():
    p = parameter((8, 12))
    found = []
    for step in (0, 1):
        optimizer = build([p], first_projector="random")
        p.grad = gradient((8, 12), step)
        optimizer.step()
        found.append(optimizer.state[p]["projector"])
    assert torch.equal(*found)
    assert torch.linalg.norm(found[0].T @ found[0] - torch.eye(3, dtype=torch.float64)) < 1e-12


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("omega", 1.5, r"omega=1.5: must be a number in \[0, 1\]"),
        ("shard", "auto", "shard='auto': each worker of LoRDO has a state of its own"),
        ("rnk", 2, "did you mean 'rank'"),
        ("proj_method", "qr", "proj_method='qr': must be svd or power_iteration"),
    ],
)
def test_bad_options(option, value, message):
    with pytest.raises(OptionError, match=message):
        LoRDO([parameter((4, 4))], lr=0.1, **{option: value})
