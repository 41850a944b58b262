"""Compression that loses nothing is the dense method; no damping scale is a gradient step; one process of many is itself."""

import pytest
import torch

from hf_efcp.engine import stacks
from tests.reference import (
    NAMES,
    compressed_names,
    error,
    exact_options,
    info,
    make,
    names,
    parameters,
    relative,
    row,
    set_gradients,
    update_of,
)

pytestmark = pytest.mark.usefixtures("kernels")


@pytest.mark.parametrize("name", compressed_names())
def test_without_loss_it_is_the_dense_method(name):
    family = info(name).family
    (uncompressed,) = names(family=family, compression="dense")
    params, generator = parameters(), torch.Generator().manual_seed(1)
    options = {"window_size": 4, "damping": 1e-4} if family == "mfac" else {"window_size": 4}
    compressed = make(name, params, **options, **exact_options(name))
    dense = make(uncompressed, params, **options)
    for _ in range(11):
        set_gradients(params, generator)
        torch.testing.assert_close(update_of(compressed, params), update_of(dense, params), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", names(windowed=True))
def test_rows_and_error_telescope_to_the_gradients(name):
    params, generator = parameters(), torch.Generator().manual_seed(1)
    m = 40
    optimizer = make(name, params, window_size=m)
    sums = [torch.zeros(p.numel(), dtype=torch.float64) for p in params]
    for _ in range(m):
        for total, g in zip(sums, set_gradients(params, generator), strict=True):
            total += g.flatten()
        optimizer.step()
    for p, total in zip(params, sums, strict=True):
        rows = sum(row(optimizer, p, i) for i in range(m))
        torch.testing.assert_close(rows + error(optimizer, p), total, rtol=1e-12, atol=1e-12)
    compressed = [p for p in params if error(optimizer, p).any()]
    assert compressed or info(name).compression == "dense", "the test must see a loss"


@pytest.mark.parametrize("name", names(family="mfac"))
def test_huge_damping_is_a_gradient_step(name):
    params, generator = parameters(), torch.Generator().manual_seed(1)
    optimizer = make(name, params, window_size=4, damping=1e9, **exact_options(name))
    for _ in range(6):
        g = torch.cat([x.flatten() for x in set_gradients(params, generator)])
        assert relative(1e9 * update_of(optimizer, params), g) < 1e-8


@pytest.mark.parametrize("name", names(family="mfac"))
def test_one_tensor_has_one_scope(name):
    params, generator = parameters([(9, 14)]), torch.Generator().manual_seed(1)
    model, layer = (make(name, params, window_size=4, damping=1e-4, scope=s) for s in ("model", "layer"))
    for _ in range(7):
        set_gradients(params, generator)
        torch.testing.assert_close(update_of(model, params), update_of(layer, params), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", NAMES)
def test_batching_changes_nothing(name, monkeypatch):
    """Eight tensors of one shape in one stack, against each in a stack of its own."""
    together, alone = parameters([(12, 30)] * 8), parameters([(12, 30)] * 8)
    a = make(name, together, window_size=4)
    b = make(name, alone, window_size=4)
    a.setup()
    monkeypatch.setitem(stacks._STACK_BYTES, "cpu", 1)
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    for _ in range(7):
        set_gradients(together, generators[0])
        set_gradients(alone, generators[1])
        torch.testing.assert_close(update_of(a, together), update_of(b, alone), rtol=1e-12, atol=1e-14)
    assert len(a.setup().stacks) == 1 and len(b.setup().stacks) == 8
