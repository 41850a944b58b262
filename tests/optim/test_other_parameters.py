"""A checkpoint of other trainable parameters is refused, and the message names those that are missing or new."""

import pytest
import torch
from torch import nn

import hf_efcp
from hf_efcp import OptionError
from tests.optim.helpers import differences, snapshot
from tests.reference import NAMES, make

BY_NAME = pytest.mark.parametrize("name", NAMES)


class Model(nn.Sequential):
    def __init__(self, frozen=()):
        super().__init__(nn.Linear(6, 9), nn.LayerNorm(9), nn.Linear(9, 5))
        for name, p in self.named_parameters():
            p.requires_grad_(name not in frozen)


def trained(name, frozen=(), groups=hf_efcp.parameter_groups, steps=2, **options):
    model = Model(frozen)
    optimizer = make(name, groups(model), lr=0.01, window_size=4, **options)
    for t in range(steps):
        for p in model.parameters():
            p.grad = torch.full_like(p, 0.1 * (t + 1)) if p.requires_grad else None
        optimizer.step()
    return optimizer, list(model.parameters())


def list_of_names(model):
    return [(n, p) for n, p in model.named_parameters() if p.requires_grad]


OTHER = [
    ([], ["2.bias"], r"trained there and not here: 2\.bias \(groups of \[2, 4\] tensors, here of \[2, 3\]\)"),
    (["0.weight", "2.bias"], [], r"trained here and not there: 0\.weight, 2\.bias \(groups"),
    (["0.weight"], ["2.bias", "1.bias"], r"trained here and not there: 0\.weight; trained there and not here: 1\.bias, 2\.bias"),
]


@pytest.mark.parametrize(("there", "here", "message"), OTHER)
@BY_NAME
def test_names_are_given(name, there, here, message):
    saved = trained(name, there)[0].state_dict()
    optimizer, params = trained(name, here)
    before = snapshot(optimizer, params)
    with pytest.raises(OptionError, match=f"checkpoint is of other parameters; {message}"):
        optimizer.load_state_dict(saved)
    assert differences(before, snapshot(optimizer, params)) == []


@BY_NAME
def test_as_many_others_that_overlap_are_not_taken_by_position(name):
    """Layers 0 to 2 were trained, 1 to 3 are now: layer 1 must not get the state of layer 0."""
    layers = [(f"layer {i}", nn.Parameter(torch.ones(6, 9))) for i in range(4)]
    first, last = (make(name, pairs, lr=0.01, window_size=4) for pairs in (layers[:3], layers[1:]))
    for _, p in layers:
        p.grad = torch.ones_like(p)
    first.step()
    with pytest.raises(OptionError, match="trained here and not there: layer 3; trained there and not here: layer 0 "):
        last.load_state_dict(first.state_dict())


def test_many_names_are_cut_off():
    layers = [(f"layer {i}", nn.Parameter(torch.ones(3))) for i in range(9)]
    one, all_ = (make(NAMES[0], pairs, window_size=4) for pairs in (layers[:1], layers))
    with pytest.raises(OptionError, match=r"not there: layer 1, layer 2, layer 3, layer 4, layer 5 and 3 more \(groups of \[1\]"):
        all_.load_state_dict(one.state_dict())


@BY_NAME
def test_as_many_parameters_of_other_names_are_taken_by_position_with_a_warning(name, caplog):
    """As torch's AdamW takes them, which says nothing: a module may have got another name."""
    saved = trained(name, ["0.bias"], list_of_names)[0].state_dict()
    trained(name, ["1.weight"], list_of_names)[0].load_state_dict(saved)
    assert "other names there, and are taken by their position: 0.bias (there 1.weight)" in caplog.text


@BY_NAME
def test_a_tensor_that_does_not_fit_is_named(name):
    optimizer, _ = trained(name, groups=list_of_names)
    wider = [(n, nn.Parameter(torch.ones(*p.shape[:-1], p.shape[-1] + 3))) for n, p in Model().named_parameters()]
    with pytest.raises(OptionError, match=r"parameter 0 \(0\.weight\): "):
        make(name, wider, lr=0.01, window_size=4).load_state_dict(optimizer.state_dict())


def test_wrapped_models_have_the_same_names(caplog):
    model = Model()
    wrapped = nn.ModuleDict({"_orig_mod": model})
    bare, other = (make(NAMES[0], module.named_parameters(), window_size=4) for module in (model, wrapped))
    other.load_state_dict(bare.state_dict())
    assert caplog.text == ""


@pytest.mark.parametrize(("there", "here", "message"), OTHER)
def test_adamw_refuses_them_without_names(there, here, message):
    saved = torch.optim.AdamW(hf_efcp.parameter_groups(Model(there))).state_dict()
    with pytest.raises(ValueError, match="doesn't match the size"):
        torch.optim.AdamW(hf_efcp.parameter_groups(Model(here))).load_state_dict(saved)
