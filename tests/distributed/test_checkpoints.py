"""Sharded state on disk: any number of processes writes, any number reads, and what is not whole is refused."""

import functools
import shutil

import pytest
import torch
import torch.distributed as dist

from hf_efcp import OptionError
from tests.distributed.processes import run
from tests.distributed.test_sharding import build, flat, problem, train
from tests.optim.helpers import differences, snapshot
from tests.reference import IN_TURN, relative

HALF, END = 8, 16  # the window of 6 has wrapped around
BF16 = {"scope": "layer", "error_dtype": "bf16", "window_dtype": "bf16"}
OPTIONS = {"momentum": 0.5, "weight_decay": 0.1}


def start(name, **options):
    params = problem()
    group = dist.group.WORLD if dist.is_initialized() else None
    return build(name, params, process_group=group, **{**OPTIONS, **options}), params


def save_half_way(rank, folder, options):
    """Train, save, go on to the end."""
    ends = {}
    for name in IN_TURN:
        optimizer, params = start(name, **options)
        train(optimizer, params, 0, HALF)
        optimizer.save_shards(folder / name)
        if rank == 0:
            torch.save([optimizer.state_dict(), [p.detach().clone() for p in params]], folder / f"{name}.pt")
        train(optimizer, params, HALF, END)
        ends[name] = flat(params), snapshot(optimizer, params)
    return ends


def resume(rank, folder, options):
    """From what was saved to the end."""
    ends = {}
    for name in IN_TURN:
        optimizer, params = start(name, **options)
        state, values = torch.load(folder / f"{name}.pt", weights_only=True)
        with torch.no_grad():
            for p, value in zip(params, values, strict=True):
                p.copy_(value)
        optimizer.shard_folder = folder / name
        optimizer.load_state_dict(state)
        train(optimizer, params, HALF, END)
        ends[name] = flat(params), snapshot(optimizer, params)
    return ends


def save_alone(folder, options):
    for name in IN_TURN:
        optimizer, params = start(name, **options)
        train(optimizer, params, 0, HALF)
        torch.save([optimizer.state_dict(), [p.detach().clone() for p in params]], folder / f"{name}.pt")


@functools.cache
def alone():
    ends = {}
    for name in IN_TURN:
        optimizer, params = start(name)
        train(optimizer, params, 0, END)
        ends[name] = flat(params)
    return ends


@pytest.fixture(scope="module")
def saved_by_two(tmp_path_factory):
    """A folder, and how the two processes that saved there went on."""
    folder = tmp_path_factory.mktemp("saved")
    return folder, run(2, save_half_way, folder, {})


@pytest.fixture
def saved(saved_by_two):
    return saved_by_two[0]


def assert_they_go_on_bit_for_bit(before, folder, options):
    after = run(2, resume, folder, options)
    for mine, again in zip(before, after, strict=True):
        for name in IN_TURN:
            assert torch.equal(mine[name][0], again[name][0]), name
            assert differences(mine[name][1], again[name][1]) == [], name


def test_two_processes_go_on_bit_for_bit(saved_by_two):
    folder, before = saved_by_two
    assert_they_go_on_bit_for_bit(before, folder, {})


@pytest.mark.slow
def test_two_processes_go_on_bit_for_bit_in_bf16(tmp_path):
    assert_they_go_on_bit_for_bit(run(2, save_half_way, tmp_path, BF16), tmp_path, BF16)


@pytest.mark.parametrize("processes", [1, 3])
def test_two_processes_save_others_go_on(processes, saved):
    ends = [resume(0, saved, {})] if processes == 1 else run(processes, resume, saved, {})
    for end in ends:
        for name in IN_TURN:
            assert relative(end[name][0], alone()[name]) <= 1e-9, name


def test_one_process_saves_two_go_on(tmp_path):
    save_alone(tmp_path, {})
    for end in run(2, resume, tmp_path, {}):
        for name in IN_TURN:
            assert relative(end[name][0], alone()[name]) <= 1e-9, name


def load(folder, shards, name="efcp_lowrank_mfac", **options):
    optimizer, params = start(name, **options)
    optimizer.shard_folder = shards
    before = snapshot(optimizer, params)
    try:
        optimizer.load_state_dict(torch.load(folder / f"{name}.pt", weights_only=True)[0])
    except OptionError:
        after = {k: v for k, v in snapshot(optimizer, params).items() if not k.startswith("state")}
        assert differences({k: v for k, v in before.items() if not k.startswith("state")}, after) == []
        assert not any(t.any() for entry in optimizer.state.values() for t in entry.values())
        raise


def copy_of(saved, tmp_path):
    return shutil.copytree(saved / "efcp_lowrank_mfac", tmp_path / "shards")


def test_a_lone_stub_says_what_is_missing(saved, tmp_path):
    with pytest.raises(OptionError, match=r"stub of a sharded optimizer; .* in a folder beside it .efcp_optim in a checkpoint"):
        load(saved, None)
    with pytest.raises(OptionError, match="nowhere is no whole checkpoint: there is no such folder"):
        load(saved, tmp_path / "nowhere")


def test_an_interrupted_save_is_refused(saved, tmp_path):
    shards = copy_of(saved, tmp_path)
    (shards / "index.json").unlink()
    with pytest.raises(
        OptionError, match=r"no whole checkpoint: it has no index\.json, nor \.metadata: the save was interrupted"
    ):
        load(saved, shards)


@pytest.mark.parametrize("file", ["rank_0.safetensors", "rank_1.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "ends too early"])
def test_a_damaged_file_is_named(file, damage, saved, tmp_path):
    shards = copy_of(saved, tmp_path)
    if damage == "missing":
        (shards / file).unlink()
    else:
        (shards / file).write_bytes((shards / file).read_bytes()[:-100])
    with pytest.raises(OptionError, match=f"{file} is .*{damage}"):
        load(saved, shards)


def test_a_damaged_index_is_named(saved, tmp_path):
    shards = copy_of(saved, tmp_path)
    (shards / "index.json").write_bytes(b"nonsense")
    with pytest.raises(OptionError, match=r"index\.json is damaged"):
        load(saved, shards)


def test_shards_of_another_run_are_refused(saved):
    with pytest.raises(OptionError, match="window_size=6, this optimizer has window_size=7"):
        load(saved, saved / "efcp_lowrank_mfac", window_size=7)
    with pytest.raises(OptionError, match=r"efcp_sparse_mfac does not fit .*missing: .*window_p.*unexpected: .*window_indices"):
        load(saved, saved / "efcp_sparse_mfac")
    with pytest.raises(OptionError, match=r"does not fit .*unexpected: .*momentum"):
        load(saved, saved / "efcp_lowrank_mfac", momentum=0.0)
