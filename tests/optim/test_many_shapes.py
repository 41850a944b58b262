"""Many small matrices of different shapes are taken together on a CPU, and train as one shape after the other does."""

import pytest
import torch

from hf_efcp.engine import together
from tests.optim.helpers import M, compressed_names, gradients_at, step_quietly
from tests.reference import few, make, parameters

pytest.importorskip("numba")

SHAPES = [(8 + i % 4, 9 + i // 2) for i in range(10)] + [(9, 11), (7,)]
VARIANTS = [
    {"weight_decay": 0.1},
    {"metric": "factored", "residual": "momentum", "window_momentum": 0.5, "window_dtype": "bf16"},
    {"metric": "factored", "error_dtype": "bf16", "scope": "layer"},
]


def trained(name, least, monkeypatch, dtype=torch.float64, **options):
    """Parameters after some steps, with a gradient that is missing and one that is not finite; and the setup."""
    monkeypatch.setattr(together, "_MANY", least)
    params = parameters(SHAPES, dtype)
    groups = [{"params": params[:5], "lr": 0.02}, {"params": params[5:]}]
    optimizer = make(name, groups, lr=0.01, window_size=M, update_rms=0.1, **options)
    for t in range(M + 4):
        gradients_at(t, params)
        if t == 3:
            params[1].grad = None
        if t == 5:
            params[2].grad[0, 0] = torch.nan
        step_quietly(optimizer)
    return torch.cat([p.detach().flatten() for p in params]), optimizer


# Each compiles for half a minute.
ALWAYS = {"efcp_lowrank_mfac": VARIANTS[1], "efcp_sparse_mfac": VARIANTS[2]}


@pytest.mark.parametrize(
    ("name", "options"),
    few([(n, v) for n in compressed_names() for v in VARIANTS], lambda pair: ALWAYS.get(pair[0]) is pair[1]),
    ids=str,
)
def test_taken_together_they_train_as_apart(name, options, monkeypatch):
    apart, optimizer = trained(name, 1000, monkeypatch, **options)
    assert not optimizer.setup().together
    end, optimizer = trained(name, 2, monkeypatch, **options)
    assert [len(many.pieces) for many in optimizer.setup().together] == [11]
    torch.testing.assert_close(end, apart, rtol=1e-7, atol=1e-9)
    assert optimizer.diagnostics()["skipped_steps"] == 1


@pytest.mark.parametrize("options", [{"momentum": 0.5}, {"error_format": "int8"}, {"metric": "diagonal"}], ids=str)
@pytest.mark.parametrize("name", compressed_names())
def test_what_the_fast_way_has_not_goes_the_usual_one(name, options, monkeypatch):
    _, optimizer = trained(name, 2, monkeypatch, **options)
    assert optimizer.setup().together == []
