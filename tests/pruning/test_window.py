"""Scores and updates of the whole model from an M-FAC window, against dense matrices in fp64."""

import copy

import pytest
import torch
from torch import nn

import hf_efcp
from hf_efcp import OptionError
from hf_efcp.pruning import prune
from hf_efcp.pruning.window import WindowCurvature
from tests.reference import known_to, names, window


class Regression(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x, y):
        return {"loss": (self.second(torch.tanh(self.first(x))) - y).square().mean()}


def model_and_batches(number=10, seed=0):
    torch.manual_seed(seed)
    model = Regression().double()
    return model, [{"x": torch.randn(16, 6).double(), "y": torch.randn(16, 4).double()} for _ in range(number)]


def trained(name, model, batches, **options):
    options = known_to(name, {"window_size": 7, "damping": 0.3, **options})
    optimizer = hf_efcp.create_optimizer(name, model.parameters(), lr=1e-3, **options)
    for batch in batches:
        optimizer.zero_grad()
        model(**batch)["loss"].backward()
        optimizer.step()
    return optimizer


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def oracle(f, w, keep):
    """Scores, and the minimiser of (v - w)^T F (v - w) with zeros outside of keep, by dense solves."""
    q, s, v = keep, ~keep, torch.zeros_like(w)
    v[q] = w[q] + torch.linalg.solve(f[q][:, q], f[q][:, s] @ w[s])
    return w.square() / torch.linalg.inv(f).diagonal(), v


METRICS = {"none": {}, "metric": {"metric": "tensor"}, "diagonal": {"metric": "diagonal"}, "filled": {"divisor": "filled"}}


@pytest.mark.parametrize("name", names(family="mfac"))
@pytest.mark.parametrize("options", METRICS.values(), ids=METRICS)
def test_scores_and_update_are_those_of_the_dense_fisher(name, options, monkeypatch):
    monkeypatch.setattr("hf_efcp.pruning.window.ROOM", 3000)  # a few rows at a time
    model, batches = model_and_batches(4 if options else 10)  # a window that is partly filled, and one that wrapped around
    optimizer = trained(name, model, batches, **options)
    g = window(optimizer, list(model.parameters()))
    curvature = WindowCurvature(optimizer)
    size = torch.cat([sizes_of(curvature)[id(p)] for p in model.parameters()]) if "metric" in options else torch.ones(g.shape[1])
    if "metric" in options:
        assert size.std() > 0
    n = 4 if options.get("divisor") == "filled" else 7
    f = size.double()[:, None] * (0.3 * torch.eye(g.shape[1]).double() + g.mT @ g / n) * size.double()
    w = flat(model)
    before = copy.deepcopy(model)
    found = curvature.scores()
    masks = prune(model, None, 0.7, method="mfac", optimizer=optimizer)
    keep = torch.cat([masks.keep.get(n, torch.ones(p.shape, dtype=torch.bool)).flatten() for n, p in model.named_parameters()])
    scores, expected = oracle(f, w, keep)
    ours = torch.cat([found[p].flatten() for p in model.parameters()])
    assert torch.allclose(ours, scores, rtol=1e-6)
    assert (flat(model) - expected).abs().max() < 1e-8 * expected.abs().max()
    weights = torch.cat([torch.full((p.numel(),), "weight" in n) for n, p in before.named_parameters()])
    removed = scores[weights & ~keep]
    assert len(removed) == round(0.7 * int(weights.sum())) and removed.max() <= scores[weights & keep].min()


def sizes_of(curvature):
    """S of each parameter, from the metric's own state: what divides an update of ones."""
    found = {}
    for s in curvature._stacks:
        ones = torch.ones(len(s.pieces), *s.shape, dtype=torch.float64)
        inverse = s.metric.unwhiten_(ones)
        found |= {id(piece.param): 1 / inverse[i].flatten() for i, piece in enumerate(s.pieces)}
    return found


def test_a_window_is_filled_by_gradients_and_nothing_else_changes():
    model, batches = model_and_batches()
    other = copy.deepcopy(model)
    prune(other, batches, 0.0, method="mfac", window_size=5)
    assert torch.equal(flat(other), flat(model)) and all(p.grad is None for p in other.parameters())
    masks = prune(model, batches, 0.5, method="mfac", window_size=5)
    assert masks.sparsity() == 0.5 and masks.are_zero()


def test_n_m_and_blocks():
    for pattern, share in (("2:4", None), ("2x2", 0.5)):
        model, batches = model_and_batches()
        masks = prune(model, batches, share, pattern, method="mfac", modules="second")
        assert masks.keep.keys() == {"second.weight"} and masks.sparsity() == 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scope": "layer"}, "needs scope='model'"),
        ({"centered": True}, "needs centered=False"),
    ],
)
def test_windows_that_do_not_fit(options, message):
    model, batches = model_and_batches(3)
    with pytest.raises(OptionError, match=message):
        prune(model, None, 0.5, method="mfac", optimizer=trained(names(family="mfac")[0], model, batches, **options))


def test_optimizers_that_do_not_fit():
    model, batches = model_and_batches(3)
    for optimizer, message in (
        (torch.optim.AdamW(model.parameters()), "optimizer=AdamW: method='mfac' needs one of the M-FAC family"),
        (trained(names(family="ggt")[0], model, batches), "needs one of the M-FAC family"),
        (trained(names(family="mfac")[0], model, []), "its window is empty"),
        (trained(names(family="mfac")[0], model.second, []), "its window is empty"),
    ):
        with pytest.raises(OptionError, match=message):
            prune(model, None, 0.5, method="mfac", optimizer=optimizer)
