"""memory_budget on another number of processes than saved the state: what was chosen then is taken, and its tensors arrive."""

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict

from hf_efcp.engine.choices import BUDGETED
from hf_efcp.options import OptionError
from tests.distributed import fsdp2
from tests.distributed.processes import run
from tests.distributed.test_sharding import problem
from tests.distributed.test_sharding import train as train_ddp
from tests.reference import make

# Bytes with which 1, 2 and 3 processes choose differently.
BUDGETS = {"efcp_lowrank_mfac": 12_000, "efcp_sparse_ggt": 30_000}
FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)
pytestmark = pytest.mark.filterwarnings("ignore:.*assuming the intent is to load in a single process", "ignore:memory_budget=")


def start(name):
    module = fsdp2.divided() if dist.is_initialized() else fsdp2.Parameters()
    params = list(module.parameters())
    return module, params, make(name, params, memory_budget=BUDGETS[name])


def choice(optimizer):
    return tuple(getattr(optimizer.options, name, None) for name in BUDGETED)


def whole(optimizer):
    """(parameter, name) -> the whole tensor; collective."""
    entries = optimizer.state_dict()["state"]
    return {(i, name): fsdp2.full(t) for i, entry in entries.items() for name, t in entry.items()}


def save(rank, folder):
    found = {}
    for name in BUDGETS:
        module, params, optimizer = start(name)
        fsdp2.train(optimizer, params, 0, 5)
        dcp.save({"optimizer": get_optimizer_state_dict(module, optimizer)}, checkpoint_id=folder / name)
        full = get_optimizer_state_dict(module, optimizer, options=FULL)
        if rank == 0:
            torch.save(full, folder / f"{name}.pt")
        found[name] = choice(optimizer), whole(optimizer)
    return found


def load_sharded(rank, folder, name, module, optimizer):
    optimizer.choose_as(folder / name)
    found = {"optimizer": get_optimizer_state_dict(module, optimizer)}
    dcp.load(found, checkpoint_id=folder / name)
    set_optimizer_state_dict(module, optimizer, found["optimizer"])


def load_full(rank, folder, name, module, optimizer):
    """Only the first process sees the file of which the choice is taken."""
    optimizer.choose_as(folder / f"{name}.pt" if rank == 0 else folder / "none.pt")
    state = torch.load(folder / f"{name}.pt", weights_only=True)
    set_optimizer_state_dict(module, optimizer, state, options=FULL)


def broadcast(rank, folder, name, module, optimizer):
    state = torch.load(folder / f"{name}.pt", weights_only=True) if rank == 0 else {}
    optimizer.choose_as(state)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_optimizer_state_dict(module, optimizer, state, options=options)


def load(rank, folder, ways):
    """(name, way) -> what a new run chooses by itself, what it has after loading, and its state."""
    found = {}
    for name in BUDGETS:
        for way in ways:
            module, _, optimizer = start(name)
            *_, other = start(name)
            other.memory_footprint()
            way(rank, folder, name, module, optimizer)
            found[name, way.__name__] = choice(other), choice(optimizer), whole(optimizer)
    return found


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    return folder, run(2, save, folder)[0]


@pytest.mark.parametrize(("processes", "ways"), [(3, (load_sharded, load_full, broadcast)), (1, (load_sharded, load_full))])
def test_others_take_the_choice_that_was_saved(saved, processes, ways):
    folder, expected = saved
    everybody = [load(0, folder, ways)] if processes == 1 else run(processes, load, folder, ways)
    for (name, way), (new, taken, state) in (item for found in everybody for item in found.items()):
        chosen, tensors = expected[name]
        assert new != chosen, name
        assert taken == chosen, (name, way)
        assert state.keys() == tensors.keys()
        if way == "broadcast" and torch.__version__ < (2, 7):
            continue  # torch 2.6 broadcasts other rows where it is not dimension 0 that is divided
        for key, t in tensors.items():
            t = t.to(state[key].dtype) if t.dtype == torch.int32 else t  # int16 on one process
            assert torch.equal(state[key], t), (name, way, key)


def test_where_torch_has_mixed_two_choices_the_error_names_the_options(saved):
    folder, expected = saved
    for name in BUDGETS:
        module, _, optimizer = start(name)
        state = torch.load(folder / f"{name}.pt", weights_only=True)
        message = rf"call choose_as .* or give the options of the run that saved it: window_size={expected[name][0][0]}, "
        with pytest.raises(OptionError, match=message):
            set_optimizer_state_dict(module, optimizer, state, options=FULL)


def shards(name, group=None):
    params = problem()
    return make(name, params, memory_budget=BUDGETS[name], process_group=group), params


def save_shards(rank, folder):
    found = {}
    for name in BUDGETS:
        optimizer, params = shards(name, dist.group.WORLD)
        train_ddp(optimizer, params, 0, 5)
        optimizer.save_shards(folder / name)
        if rank == 0:
            torch.save(optimizer.state_dict(), folder / f"{name}.pt")
        found[name] = choice(optimizer)
    return found


def test_shards_of_ddp_name_their_choice(tmp_path):
    everybody = run(2, save_shards, tmp_path)
    for name in BUDGETS:
        optimizer, params = shards(name)
        train_ddp(optimizer, params, 0, 1)
        assert choice(optimizer) != everybody[0][name]
        optimizer.shard_folder = tmp_path / name
        optimizer.load_state_dict(torch.load(tmp_path / f"{name}.pt", weights_only=True))
        assert choice(optimizer) == everybody[0][name]
        assert int(optimizer.setup().counters.step) == 5
