"""Banded sparse training (RBBM, arXiv 2506.01863): forward by the largest weights, a band in which weights stand still."""

import pytest
import torch
from torch import nn

import hf_efcp
from hf_efcp import OptionError
from hf_efcp.pruning import prune


def layer_and_weight():
    torch.manual_seed(0)
    layer = nn.Linear(20, 10).double()
    return layer, layer.weight.detach().clone()


@pytest.mark.parametrize(("sparsity", "band"), [(0.8, 0.3), (0.5, 0.45), (0.9, 0.05)])
def test_forward_and_backward(sparsity, band):
    layer, theta = layer_and_weight()
    banded = prune(layer, None, sparsity, training="banded", band=band)
    assert banded.sparsity() == pytest.approx(sparsity)
    size = theta.abs()
    t_k = size.flatten().sort(descending=True).values[round((1 - sparsity) * 200) - 1]
    t_p = theta.square().mean().sqrt() * torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(0.5 + band)).double()
    x = torch.randn(7, 20, dtype=torch.float64)
    assert torch.allclose(layer(x), x @ torch.where(size >= t_k, theta, 0).mT + layer.bias, rtol=1e-12)
    layer(x).square().sum().backward()
    full = 2 * layer(x).detach().mT @ x  # of the sparse weight
    outside = (size < min(t_p, t_k)) | (size > max(t_p, t_k))
    assert outside.any() and not outside.all()
    (original,) = [p for name, p in layer.named_parameters() if "original" in name]
    assert torch.allclose(original.grad, torch.where(outside, full, 0), rtol=1e-12)


def test_training_moves_the_support_and_finish_leaves_a_plain_sparse_layer():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 1))
    names = [name for name, _ in model.named_parameters()]
    banded = prune(model, None, 0.75, training="banded", band=0.3)
    optimizer = hf_efcp.create_optimizer("efcp_dense_mfac", model, lr=0.03, preset="measured", window_size=4)
    before = model[0].weight.detach() != 0
    x = torch.randn(128, 20)
    y = x[:, :2].sum(1, keepdim=True).tanh()
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    assert ((model[0].weight != 0) != before).any()
    output, state = model(x).detach(), {name: p for name, p in model.named_parameters() if "original" in name}
    masks = banded.finish()
    assert len(state) == 2 and sorted(name for name, _ in model.named_parameters()) == sorted(names)
    assert torch.equal(model(x), output) and masks.sparsity() == pytest.approx(0.75) and masks.are_zero()


def test_mistakes():
    layer, _ = layer_and_weight()
    for given, message in (
        ({"pattern": "2:4"}, "pattern='2:4': training='banded' needs unstructured"),
        ({"sparsity": 0.5, "band": 0.5}, "band=0.5: must be > 0 and < 0.5"),
    ):
        with pytest.raises(OptionError, match=message):
            prune(layer, None, training="banded", **given)
    prune(layer, None, 0.5, training="banded")
    with pytest.raises(OptionError, match="has no layer to prune"):
        prune(layer, None, 0.5, training="banded")
