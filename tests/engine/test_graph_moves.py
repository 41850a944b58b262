"""Steps by a graph while gradients move in every step: bit for bit those without, on a graph that needs no GPU (recorded.py)."""

import copy
import logging

import pytest
import torch

from hf_efcp.engine.graph import StepGraph
from hf_efcp.kernels.tables import Spans, Tables
from tests.engine.recorded import graphs
from tests.reference import few, few_names, make, names, parameters

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="Triton does not interpret")

# A vector, a batch of two, one that is too thin to compress.
SHAPES = ((7,), (4, 10), (4, 10), (3, 4))
METRIC = {"metric": "factored", "rms_mode": "adam", "window_momentum": 0.8, "residual": "momentum"}
OPTIONS = [
    ({}, torch.float32),
    ({**METRIC, "error_dtype": "bf16"}, torch.float32),
    ({"weight_decay": 0.1, "momentum": 0.5, "stochastic_rounding": True}, torch.bfloat16),
    ({"weight_decay": 0.1, "weight_decay_mode": "l2", "window_format": "low_bit", "error_format": "int8"}, torch.float32),
]
PLAIN = names(family="mfac", compression="low rank")[0]
STEPS = 6


class Gradients:
    """Random ones, elsewhere in each step. Those of the step before are NaN: whoever reads them is found out."""

    def __init__(self, params):
        self.params, self.kept, self.generator = params, [], torch.Generator().manual_seed(0)

    def new(self, layout=torch.clone):
        for p in self.params:
            if p.grad is not None and not p.grad.is_sparse:
                p.grad.fill_(torch.nan)
            p.grad = layout(torch.randn(p.shape, generator=self.generator).to(p.dtype) / 10)
        self.kept.append([p.grad for p in self.params])  # so that no address comes again


def run(
    monkeypatch, wanted, between=None, name=PLAIN, dtype=torch.float32, steps=STEPS, shapes=SHAPES, layout=torch.clone, **options
):
    """Train for some steps, with `between(optimizer, gradients, t)` before each, which may give another optimizer.

    Returns the parameters, the graphs and the optimizer.
    """
    with graphs(monkeypatch, wanted) as made:
        gradients = Gradients(parameters(shapes, dtype=dtype))
        optimizer = make(name, gradients.params, window_size=3, update_rms=0.5, **{"lr": 0.01, **options})
        for t in range(steps):
            optimizer.param_groups[0]["lr"] = 0.01 / (1 + t)
            gradients.new(layout)
            if between is not None:
                optimizer = between(optimizer, gradients, t) or optimizer
            optimizer.step()
        return torch.cat([p.detach().double().flatten() for p in gradients.params]), made, optimizer


def both(monkeypatch, *args, **kwargs):
    """Compare the run by graphs with the one without; give the graphs, and the optimizer."""
    expected, none, _ = run(monkeypatch, False, *args, **kwargs)
    result, made, optimizer = run(monkeypatch, True, *args, **kwargs)
    assert expected.isfinite().all()
    assert none == []
    assert torch.equal(result, expected)
    return [graph.replays for graph in made], optimizer


@pytest.mark.parametrize(
    ("options", "dtype"),
    [OPTIONS[1], *(pytest.param(*rest, marks=pytest.mark.slow) for rest in (OPTIONS[0], *OPTIONS[2:]))],
    ids=str,
)
@pytest.mark.parametrize("name", few_names(names(family="mfac")))
def test_gradients_move(name, options, dtype, monkeypatch):
    replays, _ = both(monkeypatch, name=name, dtype=dtype, **options)
    assert replays == [STEPS - 3]


@pytest.mark.parametrize("name", few_names(names(windowed=False)))
def test_only_window_methods_are_captured(name, monkeypatch, caplog):
    """A rule may ask the host which tensors begin: a graph would not ask again."""
    caplog.set_level(logging.WARNING, "hf_efcp")
    _, made, _ = run(monkeypatch, True, name=name, steps=4)
    assert made == []
    assert "only window methods" in caplog.text


def test_matrices_are_read_by_tables_and_not_copied(monkeypatch):
    _, _, optimizer = run(monkeypatch, True, **METRIC)
    graph = optimizer.builder.graph._graph
    copied = {tuple(optimizer.setup().params[i].shape) for i in graph._copies}
    assert copied == {(3, 4)}  # torch reads what is stored as it is; a metric's kernel reads vectors
    assert len(graph._moving) + len(graph._copies) == len(SHAPES)


def _no_gradient(optimizer, gradients, t):
    if t >= 4:
        gradients.params[1].grad = None


def _no_gradient_for_a_step(optimizer, gradients, t):
    if t == 4:
        gradients.params[1].grad = None


def _decay(optimizer, gradients, t):
    if t == 4:
        optimizer.param_groups[0]["weight_decay"] = 0.3


def _option(optimizer, gradients, t):
    if t == 4:
        builder = optimizer.builder
        builder.options = type(builder.options)(**{**vars(builder.options), "update_rms": 0.1})


def _elsewhere(optimizer, gradients, t):
    if t == 4:
        before = gradients.params[1].data
        gradients.params[1].data = before.clone()
        before.fill_(torch.nan)


def _one_more(optimizer, gradients, t):
    if t == 4:
        optimizer.add_param_group({"params": parameters(((5, 8),), seed=1, dtype=torch.float32)})
        optimizer.param_groups[1]["params"][0].grad = torch.ones(5, 8)


def _load(optimizer, gradients, t):
    if t == 4:
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


CHANGES = [_no_gradient, _no_gradient_for_a_step, _decay, _option, _elsewhere, _one_more, _load]


@pytest.mark.parametrize("change", few(CHANGES, {_option, _load}.__contains__), ids=lambda f: f.__name__.strip("_"))
def test_what_a_graph_is_made_for_changes(change, monkeypatch):
    replays, _ = both(monkeypatch, change, steps=9, shapes=((4, 10), (4, 10)))
    assert replays[0] == 1  # of the fourth step
    assert len(replays) == 2
    assert replays[1] >= 1


def test_a_resumed_run_is_the_uninterrupted_one(monkeypatch):
    def resume(optimizer, gradients, t):
        if t != 5:
            return None
        other = make(PLAIN, gradients.params, window_size=3, update_rms=0.5, lr=optimizer.param_groups[0]["lr"])
        other.load_state_dict(optimizer.state_dict())
        return other

    expected, _, _ = run(monkeypatch, True, steps=10, shapes=SHAPES[:2])
    result, made, _ = run(monkeypatch, True, resume, steps=10, shapes=SHAPES[:2])
    assert torch.equal(result, expected)
    assert [graph.replays for graph in made] == [2, 2]


def test_a_copy_of_the_optimizer_has_no_graph(monkeypatch):
    _, made, optimizer = run(monkeypatch, True, shapes=SHAPES[:2])
    assert len(made) == 1
    other = copy.deepcopy(optimizer)
    assert other.builder.graph._graph is None
    assert other.builder.graph is not optimizer.builder.graph


def test_a_closure_makes_the_gradients(monkeypatch):
    results = []
    for wanted in (False, True):
        with graphs(monkeypatch, wanted) as made:
            p = torch.nn.Parameter(torch.randn(6, 10, generator=torch.Generator().manual_seed(0)))
            optimizer = make(PLAIN, [p], window_size=3, lr=0.1)

            def closure(p=p, optimizer=optimizer):
                optimizer.zero_grad(set_to_none=True)
                loss = (p**4).sum()
                loss.backward()
                return loss

            losses = [float(optimizer.step(closure)) for _ in range(STEPS)]
            with torch.enable_grad():
                losses.append(float(optimizer.step(closure)))
            results.append((losses, [graph.replays for graph in made]))
    assert results[0][0] == results[1][0]
    assert results[1][1] == [STEPS - 2]


def transposed(x):
    """Not contiguous, where it can be."""
    return x.mT.contiguous().mT if x.ndim == 2 else x


def inside(x):
    """At an odd place of a bucket, as DDP has gradients."""
    bucket = torch.full((x.numel() + 6,), torch.nan, dtype=x.dtype)
    view = bucket[3 : x.numel() + 3].view(x.shape)
    view.copy_(x)
    return view


@pytest.mark.parametrize("layout", few([transposed, inside], {inside}.__contains__))
def test_gradients_lie_otherwise(layout, monkeypatch):
    replays, optimizer = both(monkeypatch, layout=layout, **METRIC)
    assert replays == [STEPS - 3]
    copied = len(optimizer.builder.graph._graph._copies)
    assert copied == (3 if layout is transposed else 1)


def test_two_parameters_have_one_gradient(monkeypatch):
    def share(optimizer, gradients, t):
        if t < 5:
            gradients.params[2].grad = gradients.params[1].grad

    both(monkeypatch, share, shapes=SHAPES[:3])


def test_a_gradient_that_is_not_finite(monkeypatch):
    def spoil(optimizer, gradients, t):
        if t == 4:
            gradients.params[1].grad[0, 0] = torch.inf

    with pytest.warns(RuntimeWarning, match="not finite"):
        _, optimizer = both(monkeypatch, spoil, steps=7, shapes=SHAPES[:3])
    assert int(optimizer.setup().counters.skipped) == 1


def test_it_is_said_once_why_there_is_no_graph(monkeypatch, caplog):
    def sparse(optimizer, gradients, t):
        for p in gradients.params:
            p.grad = p.grad.to_sparse()

    cases = [
        ({"between": sparse}, "a gradient is sparse"),
        ({"name": names(family="ggt", compression="dense")[0]}, "_linalg_eigh"),
    ]
    for case, reason in cases:
        caplog.clear()
        with caplog.at_level(logging.WARNING, "hf_efcp"):
            _, made, _ = run(monkeypatch, True, shapes=((6, 10),), **case)
        assert made == []
        assert [reason in message for message in caplog.messages] == [True]


def test_after_some_graphs_no_more_are_made(monkeypatch, caplog):
    def decay(optimizer, gradients, t):
        optimizer.param_groups[0]["weight_decay"] = 0.1 * (t // 3)

    with graphs(monkeypatch), caplog.at_level(logging.WARNING, "hf_efcp"):
        monkeypatch.setattr("hf_efcp.engine.graph._MOST", 2)
        gradients = Gradients(parameters(((6, 10),), dtype=torch.float32))
        optimizer = make(PLAIN, gradients.params, window_size=3)
        for t in range(14):
            decay(optimizer, gradients, t)
            gradients.new()
            optimizer.step()
    assert optimizer.builder.graph._made == 2
    assert ["too often" in message for message in caplog.messages] == [True]


def test_addresses_that_several_gradients_share():
    whole = torch.zeros(10)
    spans = Spans({0: whole, 1: whole[2:4], 2: whole[6:8], 3: torch.zeros(3), 4: torch.zeros(0)})
    assert spans.mixed == {0, 1, 2}
    assert spans.at(spans.starts[3] + 8) == 3
    assert spans.at(spans.starts[3] + 12) is None
    assert 4 not in spans.starts


def test_tables_follow_what_moves():
    first, second, fixed = torch.zeros(4), torch.zeros(4), torch.zeros(4)
    tables = Tables(torch.device("cpu"), 8)
    one = tables.table((first.data_ptr(), 0, fixed.data_ptr()))
    two = tables.table((fixed.data_ptr(), first.data_ptr()))
    assert one.data_ptr() % 16 == two.data_ptr() % 16 == one.data_ptr() % 16
    assert tables.table((fixed.data_ptr(), first.data_ptr())) is two
    assert tables.follow(Spans({5: first, 6: second})) == {5}
    for address in (first.data_ptr(), second.data_ptr(), first.data_ptr()):
        tables.write([address, 0])
        assert one.tolist() == [address, 0, fixed.data_ptr()]
        assert two.tolist() == [fixed.data_ptr(), address]
    with pytest.raises(RuntimeError, match="more than 8 addresses"):
        tables.table((1, 2, 3))


def test_a_table_that_begins_inside_of_a_gradient_is_refused():
    gradient, tables = torch.zeros(4), Tables(torch.device("cpu"), 2)
    tables.table((gradient.data_ptr() + 4,))
    with pytest.raises(RuntimeError, match="from its middle"):
        tables.follow(Spans({0: gradient}))


def test_a_model_that_is_large_for_the_gpu_has_no_graph_by_default(monkeypatch):  # a CPU has a memory of 0
    with graphs(monkeypatch) as made:
        monkeypatch.delenv("HF_EFCP_CUDA_GRAPH")
        p = torch.nn.Parameter(torch.ones(6, 10))
        optimizer = make(PLAIN, [p], window_size=3)
        for _ in range(5):
            p.grad = torch.ones(6, 10)
            optimizer.step()
    assert made == []
    assert isinstance(optimizer.builder.graph, StepGraph)
