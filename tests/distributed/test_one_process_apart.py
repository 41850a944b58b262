"""What could leave one process alone, or with less than it thinks it has: loads, copies, frozen parameters, figures."""

import copy
import shutil

import torch
import torch.distributed as dist

from hf_efcp import OptionError
from tests.distributed.processes import run
from tests.distributed.test_sharding import build, flat, problem, train

NAME = "efcp_lowrank_mfac"


def trained(params=None, steps=3, **options):
    params = params or problem()
    optimizer = build(NAME, params, process_group=dist.group.WORLD, **options)
    train(optimizer, params, 0, steps)
    return optimizer, params


def message(function, *args):
    try:
        function(*args)
    except OptionError as error:
        return str(error)


def load_at_the_step_of_the_save(rank, folder):
    """The first process knows the stub as its own."""
    optimizer, _ = trained()
    optimizer.save_shards(folder)
    saved = dist.get_rank(), optimizer.state_dict()
    from_first = [saved if rank == 0 else None]
    dist.broadcast_object_list(from_first, src=0)
    before = {name: t.clone() for entry in optimizer.state.values() for name, t in entry.items()}
    for entry in optimizer.state.values():
        for t in entry.values():
            t.zero_() if t.ndim else None  # the step stays
    optimizer.shard_folder = folder
    optimizer.load_state_dict(from_first[0][1])
    after = {name: t for entry in optimizer.state.values() for name, t in entry.items()}
    return all(torch.equal(before[name], after[name]) for name in before), optimizer.shard_folder


def test_a_load_right_after_the_save(tmp_path):
    assert run(2, load_at_the_step_of_the_save, tmp_path) == [(True, None)] * 2


def frozen_after_training(rank, folder):
    optimizer, params = trained()
    params[1].requires_grad_(False)
    optimizer.save_shards(folder)
    again = problem()
    again[1].requires_grad_(False)
    other = build(NAME, again, process_group=dist.group.WORLD)
    other.shard_folder = folder
    other.load_state_dict(optimizer.state_dict())
    with torch.no_grad():
        for p, q in zip(again, params, strict=True):
            p.copy_(q)
    train(optimizer, params, 3, 6)
    train(other, again, 3, 6)
    return torch.equal(flat(params), flat(again))


def test_parameters_that_were_frozen_after_training_are_loaded(tmp_path):
    assert run(2, frozen_after_training, tmp_path) == [True, True]


def copied(rank):
    small = [torch.nn.Parameter(torch.full((12, 10), 0.1)) for _ in range(4)]  # whole tensors, nothing divided by rows
    optimizer, _ = trained(small)
    theirs = copy.deepcopy(optimizer)
    automatic, _ = trained(shard="auto")
    again = copy.deepcopy((automatic, automatic.param_groups[0]["params"]))
    train(*again, 3, 6)
    train(automatic, automatic.param_groups[0]["params"], 3, 6)
    same = torch.equal(flat(again[1]), flat(automatic.param_groups[0]["params"]))
    return message(theirs.memory_footprint), same


def test_a_copy_does_not_lose_what_others_hold():
    for text, same in run(2, copied):
        assert "a copy of an optimizer whose state was divided among 2 processes" in text
        assert same


def bad_entry(rank):
    params = problem()
    alone = build(NAME, params)
    train(alone, params, 0, 3)
    saved = alone.state_dict()
    del saved["state"][2]["error"]
    optimizer = build(NAME, problem(), process_group=dist.group.WORLD)
    return message(optimizer.load_state_dict, saved)


def test_all_refuse_a_file_with_a_damaged_entry_of_one_process():
    first, second = run(2, bad_entry)
    assert first == second
    assert "parameter 2: " in first
    assert "missing: error" in first


def disk_of_its_own(rank, folder):
    optimizer, _ = trained()
    optimizer.save_shards(folder / "first")
    dist.barrier()
    if rank == 1:
        shutil.copytree(folder / "first", folder / "second")
        (folder / "second" / "index.json").unlink()
    dist.barrier()
    optimizer.shard_folder = folder / ["first", "second"][rank]
    return message(optimizer.load_state_dict, optimizer.state_dict())


def test_all_refuse_a_folder_that_one_does_not_see(tmp_path):
    first, second = run(2, disk_of_its_own, tmp_path)
    assert first == f"rank 1: {second}"
    assert "no whole checkpoint" in second


def figures(rank):
    return sorted(trained()[0].diagnostics().items())


def test_figures_are_of_the_whole():
    first, second = run(2, figures)
    assert first == second
