"""State that is moved by others: copied, pickled, prepared by accelerate, gathered by torch.distributed.checkpoint."""

import copy
import io
import pickle

import pytest
import torch

from tests.optim.helpers import (
    EVERY,
    M,
    Model,
    assert_dtypes,
    bits,
    differences,
    fresh,
    same,
    snapshot,
    started,
    through_a_file,
    train,
)
from tests.reference import make, parameters

COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
    "torch.save": lambda x: _saved_whole(x),
}


def _saved_whole(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("steps", [0, M + 1])
@pytest.mark.parametrize("how", COPIES)
@EVERY
def test_model_and_optimizer_copied_together_go_on_identically(name, how, steps):
    model = Model()
    params = list(model.tensors)
    optimizer = fresh(name, params, momentum=0.5, error_dtype="bf16")
    train(optimizer, params, 0, steps)
    clone, other = COPIES[how]((model, optimizer))
    others = list(clone.tensors)
    assert type(other) is type(optimizer) and other.options == optimizer.options
    assert differences(snapshot(optimizer, params), snapshot(other, others)) == []
    before = snapshot(optimizer, params)
    train(other, others, steps, steps + M + 1)
    assert differences(before, snapshot(optimizer, params)) == [], "the original must not move with its copy"
    train(optimizer, params, steps, steps + M + 1)
    assert differences(snapshot(optimizer, params), snapshot(other, others)) == []
    assert optimizer.memory_footprint() == other.memory_footprint()
    assert optimizer.diagnostics() == other.diagnostics()


@EVERY
def test_a_copy_can_take_a_new_group_and_be_saved(name):
    optimizer, params = started(name)
    others, other = copy.deepcopy((params, optimizer))
    new = parameters([(9, 9)], torch.float32, seed=3)
    other.add_param_group({"params": new})
    train(other, [*others, *new], 10, 12)
    assert len(other.state_dict()["param_groups"]) == 2 and len(optimizer.param_groups) == 1


@EVERY
def test_a_pickled_optimizer_is_no_larger_than_its_state(name):
    params = parameters([(150, 200)] * 4, torch.float32)
    optimizer = make(name, params, window_size=16)
    train(optimizer, params, 0, 1)
    held = sum(optimizer.memory_footprint().values()) + sum(bits(p).numel() for p in params)
    assert len(pickle.dumps((params, optimizer))) < 1.05 * held + 10_000


# accelerate, torch.distributed.checkpoint --------------------------------------------------------------------------------


@pytest.fixture
def accelerator():
    accelerate = pytest.importorskip("accelerate")
    yield accelerate.Accelerator(cpu=True)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("steps", [0, M + 1], ids=["new", "with state"])
@EVERY
def test_accelerate_prepare_on_a_bf16_model(name, steps, accelerator):
    """`prepare` saves and loads the state: torch's own loading would cast it to bf16."""
    model, twin = Model(torch.bfloat16), Model(torch.bfloat16)
    optimizer, reference = (fresh(name, list(m.tensors), momentum=0.5) for m in (model, twin))
    train(optimizer, list(model.tensors), 0, steps)
    train(reference, list(twin.tensors), 0, steps)
    prepared, wrapped = accelerator.prepare(model, optimizer)
    train(wrapped, list(prepared.tensors), steps, steps + M + 1)
    train(reference, list(twin.tensors), steps, steps + M + 1)
    assert_dtypes(optimizer)
    assert differences(snapshot(optimizer, list(model.tensors)), snapshot(reference, list(twin.tensors))) == []


@pytest.mark.parametrize("name", ["efcp_lowrank_mfac", "efcp_sparse_ggt"])
def test_accelerate_saves_and_loads(name, accelerator, tmp_path):
    model = Model(torch.bfloat16)
    params = list(model.tensors)
    model, optimizer = accelerator.prepare(model, fresh(name, params))
    train(optimizer, params, 0, M + 1)
    accelerator.save_state(tmp_path)
    saved = snapshot(optimizer.optimizer, params)
    train(optimizer, params, 10, 12)
    expected = snapshot(optimizer.optimizer, params)
    accelerator.load_state(tmp_path)
    assert differences(saved, snapshot(optimizer.optimizer, params)) == []
    train(optimizer, params, 10, 12)
    assert differences(expected, snapshot(optimizer.optimizer, params)) == []


@pytest.mark.parametrize("steps", [0, M + 1], ids=["new", "trained"])
@EVERY
def test_torch_distributed_checkpoint_state_dicts(name, steps):
    """They make state by a step with zero gradients, and rename parameters; on one process no group is needed."""
    dcp = pytest.importorskip("torch.distributed.checkpoint.state_dict")
    model = Model()
    params = list(model.tensors)
    optimizer = fresh(name, params)
    train(optimizer, params, 0, M + 2)
    saved = dcp.get_optimizer_state_dict(model, optimizer)
    other_model = copy.deepcopy(model)
    others = list(other_model.tensors)
    other = fresh(name, others)
    if steps:
        train(other, others, 30, 30 + steps)
        other_model.load_state_dict(model.state_dict())
    before = [p.detach().clone() for p in others]
    dcp.set_optimizer_state_dict(other_model, other, optim_state_dict=through_a_file(saved))
    assert all(same(p, b) for p, b in zip(others, before, strict=True))
    train(optimizer, params, 10, 10 + M)
    train(other, others, 10, 10 + M)
    assert differences(snapshot(optimizer, params), snapshot(other, others)) == []
