"""`prune` on small models: its layer problems against brute force, patterns, kinds of layers, mistakes."""

import copy

import pytest
import torch
from torch import nn

from hf_efcp import OptionError
from hf_efcp.pruning import Masks, prune
from hf_efcp.pruning.layers import in_order, layers_of, moments_of
from hf_efcp.pruning.model import Problem
from hf_efcp.pruning.options import PruningOptions
from hf_efcp.pruning.patterns import Pattern
from hf_efcp.pruning.projection import restricted_least_squares
from hf_efcp.pruning.supports import SUPPORTS


class Mixed(nn.Module):
    """A convolution, a Linear of transformers' other layout, and a Linear; the inputs of all of them are correlated."""

    def __init__(self):
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.conv = nn.Conv2d(1, 8, 3, stride=2, padding=1)
        self.turned = Conv1D(24, 8 * 16)
        self.last = nn.Linear(24, 8)

    def forward(self, x):
        return self.last(torch.tanh(self.turned(torch.relu(self.conv(x)).flatten(1))))


def mixed(dtype=torch.float64):
    torch.manual_seed(0)
    return Mixed().to(dtype)


def images(number=6, size=64, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn(12, 64, generator=generator, dtype=torch.float64)
    batches = [torch.randn(size, 12, generator=generator, dtype=torch.float64) @ basis for _ in range(number)]
    noise = [0.1 * torch.randn(size, 64, generator=generator, dtype=torch.float64) for _ in range(number)]
    return [(x + n).view(size, 1, 8, 8).to(dtype) for x, n in zip(batches, noise, strict=True)]


def distance(model, dense, batches):
    with torch.no_grad():
        return float(sum((model(x) - dense(x)).square().sum() for x in batches) / sum(dense(x).square().sum() for x in batches))


def test_moments_are_those_of_the_inputs():
    model, batches = mixed(), images()
    found = moments_of(model, layers_of(model, None), batches)
    x = torch.cat([nn.functional.unfold(b, 3, padding=1, stride=2).mT.flatten(0, 1) for b in batches])
    assert torch.allclose(found["conv"].hessian, x.mT @ x / len(x), rtol=1e-12)
    with torch.no_grad():
        inner = torch.cat([torch.relu(model.conv(b)).flatten(1) for b in batches])
    assert torch.allclose(found["turned"].hessian, inner.mT @ inner / len(inner), rtol=1e-12)
    assert float(found["turned"].count) == len(inner)


def test_hidden_tokens_do_not_count():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 3)

        def forward(self, x, attention_mask):
            return self.linear(x)

    x, mask = torch.randn(4, 5, 6), torch.rand(4, 5) < 0.5
    model = Tokens().train()
    found = moments_of(model, layers_of(model, None), [{"x": x, "attention_mask": mask.long()}])["linear"]
    assert torch.allclose(found.hessian, (x[mask].mT @ x[mask]).double() / mask.sum(), rtol=1e-5)
    assert model.training


@pytest.mark.parametrize("support", SUPPORTS)
def test_a_layer_gets_the_restricted_least_squares_of_its_problem(support):
    """One iteration: per row, min |X w - X w_dense|^2 / n + damping |w - w_dense|^2 over its support, by a dense solve."""
    model, batches = mixed(), images()
    dense = copy.deepcopy(model)
    masks = prune(model, batches, 0.6, target="layer", iterations=1, support=support, damping=1e-3)
    x = torch.cat([nn.functional.unfold(b, 3, padding=1, stride=2).mT.flatten(0, 1) for b in batches])
    hessian = x.mT @ x / len(x)
    hessian += 1e-3 * hessian.diagonal().mean() * torch.eye(9, dtype=torch.float64)
    w, keep = dense.conv.weight.detach().flatten(1), masks.keep["conv.weight"].flatten(1)
    for row in range(8):
        q = keep[row]
        expected = torch.linalg.solve(hessian[q][:, q], (hessian @ w[row])[q])
        assert (model.conv.weight[row].flatten()[q] - expected).abs().max() < 1e-9
    assert (model.turned.weight[~masks.keep["turned.weight"]] == 0).all()
    assert masks.sparsity() == pytest.approx(0.6, abs=0.01)


def test_supports_in_order_of_what_they_cost():
    """Of a layer with correlated inputs, at the exact solution of each. Costs one at a time know nothing of each other."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 40, generator=generator, dtype=torch.float64) @ torch.randn(40, 40, generator=generator).double()
    z = torch.randn(32, 40, generator=generator, dtype=torch.float64)
    hessian = x.mT @ x / 300 + 0.01 * torch.eye(40, dtype=torch.float64)
    inverse, lost = torch.linalg.inv(hessian), {}
    for name, choose in SUPPORTS.items():
        keep = choose(z, hessian, inverse, Pattern.parse("2:4"), 0.5)
        w = restricted_least_squares(hessian, z @ hessian, keep)
        lost[name] = float((((w - z) @ hessian) * (w - z)).sum())
    assert lost["greedy"] < lost["sweep"] < min(lost["magnitude"], lost["cost"])


def test_the_sweep_is_sparsegpts_loop():
    """Column after column with the inverse of the columns that are left, written out."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(99, 8, generator=generator, dtype=torch.float64)
    hessian, z = x.mT @ x, torch.randn(5, 8, generator=generator, dtype=torch.float64)
    keep = SUPPORTS["sweep"](z, hessian, torch.linalg.inv(hessian), Pattern.parse("2:4"), 0.5)
    w, expected = z.clone(), torch.zeros(5, 8, dtype=torch.bool)
    for j in range(8):
        rest = torch.linalg.inv(hessian[j:, j:])
        if j % 4 == 0:
            scores = torch.stack([w[:, i].square() / torch.linalg.inv(hessian[i:, i:])[0, 0] for i in range(j, j + 4)], 1)
            expected[:, j : j + 4] = scores >= scores.sort(dim=1).values[:, 2:3]
        removed = torch.where(expected[:, j], 0.0, w[:, j])
        w[:, j:] -= removed[:, None] * rest[0] / rest[0, 0]
    assert torch.equal(keep, expected)


GREEDY_AGAIN = pytest.param("4:8", "greedy", marks=pytest.mark.slow)
SUPPORTS_OF = [(p, s) for p in ("2:4", "4:8", "1x4", "4x4") for s in (None, "magnitude", "greedy") if (p, s) != ("4:8", "greedy")]


@pytest.mark.parametrize(("pattern", "support"), [*SUPPORTS_OF, GREEDY_AGAIN])
def test_patterns(pattern, support):
    blocks = "x" in pattern
    if support == "greedy" and blocks:
        with pytest.raises(OptionError, match=f"support='greedy': pattern='{pattern}' needs cost or magnitude"):
            prune(mixed(), images(), 0.5, pattern, modules="last", support=support)
        return
    model = mixed()
    masks = prune(model, images(), 0.5 if blocks else None, pattern, modules=["turned", "last"], support=support)
    assert masks.sparsity() == 0.5
    for matrix in (model.turned.weight.mT, model.last.weight):
        alive = matrix != 0
        if blocks:
            r, c = map(int, pattern.split("x"))
            parts = alive.unflatten(1, (-1, c)).unflatten(0, (-1, r)).transpose(1, 2).flatten(2)
            assert (parts.all(2) | ~parts.any(2)).all()
        else:
            m = int(pattern[2:])
            assert (alive.unflatten(1, (-1, m)).sum(2) == m // 2).all()


def test_a_block_costs_what_removing_it_costs():
    """Scores of blocks of 2 x 3 against the exact cost of removing a block alone."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 6, generator=generator, dtype=torch.float64)
    hessian, z = x.mT @ x, torch.randn(4, 6, generator=generator, dtype=torch.float64)
    inverse, costs = torch.linalg.inv(hessian), torch.zeros(2, 2, dtype=torch.float64)
    for a in range(2):
        for b in range(2):
            columns = slice(3 * b, 3 * b + 3)
            for row in z[2 * a : 2 * a + 2]:
                costs[a, b] += row[columns] @ torch.linalg.solve(inverse[columns, columns], row[columns])
    for kept in (1, 2, 3):
        keep = SUPPORTS["cost"](z, hessian, inverse, Pattern.parse("2x3"), 1 - kept / 4)
        expected = costs >= costs.flatten().sort().values[4 - kept]
        assert torch.equal(keep, expected.repeat_interleave(2, 0).repeat_interleave(3, 1))


def test_obs_is_better_than_magnitude_and_layers_in_order_against_the_dense_outputs_better_still():
    batches, found = images(), {}
    for name, options in {
        "magnitude": {"method": "magnitude"},
        "one-shot": {"target": "layer", "iterations": 1},
        "in order": {},
    }.items():
        model = mixed()
        masks = prune(model, batches, 0.7, **options)
        assert masks.sparsity() == pytest.approx(0.7, abs=0.01)
        found[name] = distance(model, mixed(), batches)
    assert found["in order"] < found["one-shot"] < found["magnitude"]


def test_against_the_dense_outputs_a_layer_sees_the_inputs_that_it_will_have():
    """The layers one after the other, by dense solves: X of the model that is pruned up to the layer, T of the dense one."""
    model, dense, batches = mixed(), mixed(), images()
    masks = prune(model, batches, 0.6, damping=1e-3)
    with torch.no_grad():
        x, x_dense = (torch.cat([torch.relu(m.conv(b)).flatten(1) for b in batches]) for m in (model, dense))
        for layer, other, turned in ((model.turned, dense.turned, True), (model.last, dense.last, False)):
            w_dense, w = (a.weight.mT if turned else a.weight for a in (other, layer))
            keep = masks.keep["turned.weight"].mT if turned else masks.keep["last.weight"]
            ridge = 1e-3 * (x.square().sum(0).mean() / len(x)) * torch.eye(x.shape[1], dtype=x.dtype)
            hessian, b = x.mT @ x / len(x) + ridge, w_dense @ (x_dense.mT @ x / len(x) + ridge)
            for row in range(len(w)):
                q = keep[row]
                assert (w[row, q] - torch.linalg.solve(hessian[q][:, q], b[row, q])).abs().max() < 1e-9
            if turned:
                x, x_dense = torch.tanh(model.turned(x)), torch.tanh(dense.turned(x_dense))


def test_against_the_dense_outputs_whole_newton_steps_need_one_iteration():
    once, often = mixed(), mixed()
    masks = prune(often, images(), 0.6, iterations=4)
    assert {len(e) for e in masks.layer_errors.values()} == {1}
    prune(once, images(), 0.6, iterations=1)
    assert all(torch.equal(a, b) for a, b in zip(once.parameters(), often.parameters(), strict=True))
    masks = prune(often, images(), 0.6, iterations=2, step=0.5)
    assert {len(e) for e in masks.layer_errors.values()} == {2}


def test_the_order_is_that_of_the_calls_and_layers_of_one_input_are_together():
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": 9}
    model = BertModel(BertConfig(**sizes), add_pooling_layer=False)
    layers = layers_of(model, None)
    batch = {"input_ids": torch.ones(2, 4, dtype=torch.long)}
    groups, once = in_order(model, layers[::-1], batch)
    assert once
    found = [[x.name.partition("layer.")[2] for x in group] for group in groups]
    assert [sorted(group) for group in found[:3]] == [
        ["0.attention.self.key", "0.attention.self.query", "0.attention.self.value"],
        ["0.attention.output.dense"],
        ["0.intermediate.dense"],
    ]
    assert sum(map(len, found)) == len(layers)
    never = [x for x in layers_of(mixed(), None) if x.name == "last"]
    assert in_order(mixed().conv, never, images()[0]) == ([never], True)  # not called: last, alone


def test_a_layer_that_is_called_twice_counts_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.shared, self.last = nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x):
            return self.last(torch.tanh(self.shared(torch.tanh(self.shared(x)))))

    torch.manual_seed(0)
    model, x = Twice().double(), torch.randn(50, 6, dtype=torch.float64)
    layers = layers_of(model, None)
    groups, once = in_order(model, layers, x)
    assert groups == [[layers[0]], [layers[1]]] and not once
    assert float(moments_of(model, groups[0], [x], copy.deepcopy(model), stop=once)["shared"].count) == 100
    masks = prune(model, [x], 0.5)  # such a layer sees its own errors: further iterations change something
    assert masks.are_zero() and {len(e) for e in masks.layer_errors.values()} == {3}


def test_a_whole_newton_step_forgets_where_it_started_and_gradient_steps_come_close():
    model, batches = mixed(), images()
    moments = moments_of(model, layers_of(model, "last"), batches)["last"]
    w = model.last.weight.detach()
    problem = Problem(w, moments, 0.1)
    assert (problem.refined(torch.zeros_like(w), PruningOptions()) - w).abs().max() < 1e-12
    half = problem.refined(torch.zeros_like(w), PruningOptions(step=0.5, refinement_steps=2))
    assert torch.allclose(half, 0.75 * w, rtol=1e-9)
    gradient = [
        problem.refined(torch.zeros_like(w), PruningOptions(refinement="gradient", refinement_steps=n)) for n in (1, 9, 99)
    ]
    far = [float((x - w).norm()) for x in gradient]
    assert far[0] > far[1] > far[2] < 0.1 * float(w.norm())


def test_inputs_that_are_always_zero_lose_their_weights_first():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(10, 4)).double(), torch.randn(50, 10, dtype=torch.float64)
    x[:, [2, 7]] = 0
    for support in SUPPORTS:
        pruned = copy.deepcopy(model)
        prune(pruned, [x], 0.4, support=support)
        assert (pruned[0].weight[:, [2, 7]] == 0).all() and pruned[0].weight.isfinite().all()


def test_a_share_of_zero_changes_next_to_nothing():
    model = mixed()
    masks = prune(model, images(), 0.0)
    assert masks.sparsity() == 0
    assert all(torch.allclose(a, b, atol=1e-9) for a, b in zip(model.parameters(), mixed().parameters(), strict=True))


def test_which_layers(tmp_path):
    from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 20}
    names = [x.name for x in layers_of(BertForSequenceClassification(BertConfig(**sizes)), None)]
    assert len(names) == 7 and all(name.startswith("bert.") for name in names)
    llama = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2))
    assert all("lm_head" not in x.name for x in layers_of(llama, None))
    assert [x.name for x in layers_of(llama, ["q_proj", "lm_head"])] == ["model.layers.0.self_attn.q_proj", "lm_head"]
    tied = nn.ModuleDict({"embedding": nn.Embedding(8, 4), "head": nn.Linear(4, 8), "other": nn.Linear(4, 8)})
    tied["head"].weight = tied["embedding"].weight
    assert [x.name for x in layers_of(tied, None)] == ["other"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sparsity": 1.0}, r"sparsity=1.0: must be a number in \[0, 1\)"),
        ({}, "sparsity=None: must be a number"),
        ({"sparsity": 0.4, "pattern": "2:4"}, "sparsity=0.4: the pattern 2:4 has 0.5"),
        ({"pattern": "4:2"}, "pattern='4:2': must be unstructured, 2:4"),
        ({"pattern": "5x5", "sparsity": 0.5}, "pattern='5x5' does not fit conv.weight: 8 x 9"),
        ({"pattern": "2:4"}, "does not fit conv.weight: 9 inputs are no multiple of 4"),
        ({"sparsity": 0.5, "iteration": 2}, "unknown option 'iteration' for prune: did you mean 'iterations'"),
        ({"sparsity": 0.5, "method": "ibos"}, "method='ibos': must be iobs or magnitude or mfac"),
        ({"sparsity": 0.5, "iterations": 0}, "iterations=0: must be >= 1"),
        ({"sparsity": 0.5, "modules": "lst"}, "unknown layer 'lst' for modules: did you mean 'last'"),
        ({"sparsity": 0.5, "calibration": None}, "calibration=None: method='iobs' needs batches"),
        ({"sparsity": 0.5, "method": "mfac"}, "method='mfac': the model returned no loss"),
    ],
)
def test_mistakes_are_one_clear_error_and_change_nothing(given, message):
    model = mixed()
    with pytest.raises(OptionError, match=message):
        prune(model, given.pop("calibration", images(2)), **given)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), mixed().parameters(), strict=True))


def test_a_layer_without_inputs_is_named():
    model = nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.randn(2, 3, 8)
    with pytest.raises(OptionError, match="layer 'out_proj' saw no calibration input"):
        prune(model, [(x, x, x)], 0.5)


# Masks --------------------------------------------------------------------------------------------------------------------


def test_masks_are_saved_with_one_bit_a_weight_and_loaded(tmp_path):
    model = mixed()
    masks = prune(model, images(), 0.6)
    masks.save(tmp_path)
    loaded = Masks.load(model, tmp_path)
    assert loaded.keep.keys() == masks.keep.keys() and loaded.are_zero()
    assert all(torch.equal(mask, loaded.keep[name]) for name, mask in masks.keep.items())
    assert all(torch.equal(mask, Masks.of_zeros(model).keep[name]) for name, mask in masks.keep.items())
    with pytest.raises(OptionError, match="no zero"):
        Masks.of_zeros(mixed())
    with pytest.raises(OptionError, match="no such parameter"):
        Masks.load(nn.Linear(3, 3), tmp_path)
    with pytest.raises(OptionError, match="no such file"):
        Masks.load(model, tmp_path / "elsewhere")
    (tmp_path / "pruning_masks.pt").write_text("nothing")
    with pytest.raises(OptionError, match="holds no masks"):
        Masks.load(model, tmp_path)
