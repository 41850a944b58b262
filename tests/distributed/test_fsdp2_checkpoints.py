"""FSDP2: what some processes save, as many or others load, through torch.distributed.checkpoint or as a full state dict."""

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from tests.distributed.fsdp2 import BF16, Parameters, divided, flat, train
from tests.distributed.processes import run
from tests.distributed.test_sharding import build
from tests.reference import IN_TURN, info, relative

HALF, END = 8, 16  # the window of 6 has wrapped around


def start(name, **options):
    module = divided() if dist.is_initialized() else Parameters()
    params = list(module.parameters())
    return module, params, build(name, params, **{"momentum": 0.5, "weight_decay": 0.1, **options})


def save_half_way(rank, folder, kind, options):
    ends = {}
    for name in IN_TURN:
        module, params, optimizer = start(name, **options)
        train(optimizer, params, 0, HALF)
        model_state, optimizer_state = get_state_dict(module, optimizer, options=KINDS[kind])
        if kind == "full":
            if rank == 0:
                torch.save([model_state, optimizer_state], folder / f"{name}.pt")
        else:
            dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder / name)
        train(optimizer, params, HALF, END)
        ends[name] = flat(params)
    return ends


def resume(rank, folder, kind, options, names=IN_TURN):
    ends = {}
    for name in names:
        module, params, optimizer = start(name, **options)
        if kind == "full":
            states = torch.load(folder / f"{name}.pt", weights_only=True)
        else:
            states = get_state_dict(module, optimizer)
            parts = {"model": states[0], "optimizer": states[1]}
            dcp.load(parts, checkpoint_id=folder / name)
            states = parts["model"], parts["optimizer"]
        set_state_dict(module, optimizer, model_state_dict=states[0], optim_state_dict=states[1], options=KINDS[kind])
        train(optimizer, params, HALF, END)
        ends[name] = flat(params)
    return ends


KINDS = {"sharded": StateDictOptions(), "full": StateDictOptions(full_state_dict=True, cpu_offload=True)}


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, marks=pytest.mark.slow),
        {**BF16, "scope": "layer"},
        pytest.param({"save_window": False}, marks=pytest.mark.slow),
    ],
    ids=["plain", "bf16", "no window"],
)
@pytest.mark.filterwarnings("ignore:.*saved without its window")
def test_two_processes_go_on_bit_for_bit(options, tmp_path):
    before = run(2, save_half_way, tmp_path, "sharded", options)
    after = run(2, resume, tmp_path, "sharded", options)
    for name in IN_TURN:
        same = torch.equal(before[0][name], after[0][name])
        assert same == options.get("save_window", True), name


@pytest.mark.parametrize(
    ("kind", "processes"),
    [("sharded", 1), *(pytest.param(*rest, marks=pytest.mark.slow) for rest in (("full", 1), ("sharded", 3), ("full", 3)))],
)
def test_two_processes_save_others_go_on(processes, kind, tmp_path):
    expected = run(2, save_half_way, tmp_path, kind, {})[0]
    ends = [resume(0, tmp_path, kind, {})] if processes == 1 else run(processes, resume, tmp_path, kind, {})
    for end in ends:
        for name in IN_TURN:
            assert relative(end[name], expected[name]) <= 1e-9, name


@pytest.mark.parametrize("kind", ["sharded", pytest.param("full", marks=pytest.mark.slow)])
def test_one_process_saves_two_go_on(kind, tmp_path):
    # Of a full state dict torch would scatter int16, the indices of sparse rows, which no backend sends.
    names = [name for name in IN_TURN if kind == "sharded" or info(name).compression != "sparse"]
    expected = save_half_way(0, tmp_path, kind, {})
    for end in run(2, resume, tmp_path, kind, {}, names):
        for name in names:
            assert relative(end[name], expected[name]) <= 1e-9, name
