"""memory_budget and checkpoints: what was chosen in the run that was saved wins, where it can be known."""

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict

import hf_efcp
from hf_efcp.engine.choices import BUDGETED
from hf_efcp.options import OptionError
from tests.optim.helpers import WINDOWED, differences, snapshot, train
from tests.reference import info

COUNT = 64 * 48 + 64 + 48 * 64 + 48
LEAST, LITTLE, MUCH = int(1.3 * COUNT), 6 * COUNT, 40 * COUNT  # bytes: less rank or density; low-bit formats; all in fp32
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*assuming the intent is to (load|save) in a single process", "ignore:TypedStorage"
)


def build(name="efcp_lowrank_mfac", budget=None, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 64), nn.Linear(64, 48))
    optimizer = hf_efcp.create_optimizer(name, model.parameters(), lr=0.01, memory_budget=budget, **options)
    return optimizer, model, list(model.parameters())


def trained(name="efcp_lowrank_mfac", budget=LITTLE, steps=3, **options):
    optimizer, model, params = build(name, budget, **options)
    train(optimizer, params, 0, steps)
    return optimizer, model, params


def chosen(optimizer):
    return tuple(getattr(optimizer.options, name, None) for name in BUDGETED)


def assert_goes_on(saver, loader):
    """Both take the same further steps, from the parameters of the first."""
    with torch.no_grad():
        for p, value in zip(loader[2], saver[2], strict=True):
            p.copy_(value)
    for optimizer, _, params in (saver, loader):
        train(optimizer, params, 3, 6)
    assert differences(snapshot(saver[0], saver[2]), snapshot(loader[0], loader[2])) == []


def gathered(saver, **options):
    """As torch.distributed.checkpoint gathers it: without our options."""
    return get_optimizer_state_dict(saver[1], saver[0], options=StateDictOptions(**options))


@WINDOWED
@pytest.mark.parametrize("steps", [0, 2], ids=["fresh", "trained"])
@pytest.mark.filterwarnings("ignore:memory_budget=")
def test_a_saved_choice_wins_over_a_new_one(name, steps):
    scale = 40 if info(name).compression == "dense" else 1  # which cannot become so small
    saver, loader = trained(name, LITTLE * scale), trained(name, MUCH * scale, steps)
    if steps:
        assert chosen(loader[0]) != chosen(saver[0])
    loader[0].load_state_dict(saver[0].state_dict())
    assert chosen(loader[0]) == chosen(saver[0])
    assert_goes_on(saver, loader)


@pytest.mark.parametrize("steps", [0, 2], ids=["fresh", "trained"])
def test_a_saved_choice_that_exceeds_the_budget_is_warned_of(steps):
    saver, loader = trained(budget=MUCH), trained(budget=LITTLE, steps=steps)
    message = rf"memory_budget=.* KiB: with window_size={saver[0].options.window_size}, .*, as it was saved, the state takes"
    with pytest.warns(UserWarning, match=message):
        loader[0].load_state_dict(saver[0].state_dict())
    assert_goes_on(saver, loader)


@WINDOWED
@pytest.mark.parametrize(("theirs", "mine"), [(LITTLE, MUCH), (MUCH, LITTLE), (LITTLE, LEAST), (LEAST, LITTLE)])
@pytest.mark.filterwarnings("ignore:memory_budget=")
def test_without_options_the_tensors_tell(name, theirs, mine):
    if info(name).compression == "dense":  # which cannot become so small
        theirs, mine = 40 * theirs, 40 * mine
    saver, loader = trained(name, theirs), build(name, mine)
    set_optimizer_state_dict(loader[1], loader[0], gathered(saver))  # gives the new one a state of its own first
    assert chosen(loader[0]) == chosen(saver[0])
    assert_goes_on(saver, loader)


def test_a_window_that_was_given_is_told_too():
    saver, loader = trained(budget=None, window_size=50), build(budget=MUCH)
    set_optimizer_state_dict(loader[1], loader[0], gathered(saver))
    assert_goes_on(saver, loader)


# Options that no budget chooses; what is said of them.
UNUSUAL = {
    "window_size=5, window_format=plain, window_dtype=float32, error_format=int8": {"error_format": "int8"},
    "window_size=5, window_format=low_bit, error_format=plain, error_dtype=float32": {"window_format": "low_bit"},
    "window_size=5, window_format=low_bit, error_format=int4": {"window_format": "low_bit", "error_format": "int4"},
}


@pytest.mark.parametrize("options", UNUSUAL.values(), ids=UNUSUAL)
def test_the_tensors_tell_what_no_budget_chooses(options):
    saver = trained(budget=None, window_size=5, rank=3, **options)
    loader = build(budget=MUCH)
    set_optimizer_state_dict(loader[1], loader[0], gathered(saver))
    assert_goes_on(saver, loader)


@pytest.mark.parametrize("said", UNUSUAL)
def test_where_it_cannot_be_known_the_error_names_the_options(said):
    """The density of a sparse method: tensors do not tell it."""
    saver = trained("efcp_sparse_mfac", None, window_size=5, density=0.05, **UNUSUAL[said])
    loader = trained("efcp_sparse_mfac", budget=MUCH)
    before = snapshot(loader[0], loader[2])
    message = rf"parameter 0: .*: no choice of memory_budget=.* has this state.* choose_as .* of the run that saved it: {said} \("
    with pytest.raises(OptionError, match=message):
        set_optimizer_state_dict(loader[1], loader[0], gathered(saver))
    assert differences(before, snapshot(loader[0], loader[2])) == []
    train(loader[0], loader[2], 3, 4)
    given = dict(part.split("=") for part in said.split(", "))
    loader = build("efcp_sparse_mfac", budget=MUCH, density=0.05, **{**UNUSUAL[said], **given})
    set_optimizer_state_dict(loader[1], loader[0], gathered(saver))
    assert_goes_on(saver, loader)


def test_what_is_given_is_not_taken_from_the_checkpoint():
    saver, loader = trained(), build(budget=MUCH, window_size=64)
    assert saver[0].options.window_size != 64
    with pytest.raises(OptionError, match=f"window_size={saver[0].options.window_size}, this optimizer has window_size=64"):
        loader[0].load_state_dict(saver[0].state_dict())
    with pytest.raises(OptionError, match="no choice of memory_budget"):
        set_optimizer_state_dict(loader[1], loader[0], gathered(saver))


@pytest.mark.filterwarnings("ignore:memory_budget=")
def test_a_checkpoint_of_other_parameters_changes_nothing():
    saver = trained(budget=MUCH)[0].state_dict()
    optimizer, _, params = trained()
    before = snapshot(optimizer, params)
    saver["state"][0]["error"] = saver["state"][0]["error"][:-1]
    with pytest.raises(OptionError, match=r"parameter 0: error is \(63, 48\) .* here$"):
        optimizer.load_state_dict(saver)
    assert differences(before, snapshot(optimizer, params)) == []
    train(optimizer, params, 3, 4)


def test_a_checkpoint_without_its_window_keeps_the_new_choice():
    saver, loader = trained(save_window=False), build(budget=LITTLE, save_window=False)
    with pytest.warns(UserWarning, match="saved without its window"):
        set_optimizer_state_dict(loader[1], loader[0], gathered(saver))
    loader = build(budget=MUCH, save_window=False)
    with pytest.raises(OptionError, match=r"of the run that saved it: rank=4, error_format=int\d \("):
        set_optimizer_state_dict(loader[1], loader[0], gathered(saver))


# Before torch.distributed.checkpoint loads ------------------------------------------------------------------------------


@pytest.fixture(params=["folder", "file", "state dict", "flat", "ours"])
def saved(request, tmp_path):
    """A run and what it has saved, in the forms that choose_as takes."""
    run = trained()
    if request.param == "folder":
        dcp.save({"model": run[1].state_dict(), "optimizer": gathered(run)}, checkpoint_id=tmp_path / "dcp")
        return run, tmp_path / "dcp"
    if request.param == "file":
        torch.save(gathered(run), tmp_path / "optimizer.bin")
        return run, str(tmp_path / "optimizer.bin")
    if request.param == "ours":
        return run, run[0].state_dict()
    return run, gathered(run, flatten_optimizer_state_dict=request.param == "flat")


def test_choose_as_takes_the_choice_of_what_is_saved(saved):
    run, what = saved
    optimizer, _, params = build(budget=MUCH)
    optimizer.choose_as(what)
    optimizer.memory_footprint()
    assert chosen(optimizer) == chosen(run[0])
    train(optimizer, params, 0, 3)
    assert differences(snapshot(run[0], run[2]), snapshot(optimizer, params)) == []
    given = build(budget=MUCH, window_size=run[0].options.window_size + 1)[0]
    if not (isinstance(what, dict) and "efcp" in what):
        with pytest.raises(OptionError, match=r"choose_as: no choice of memory_budget=.* window_format=low_bit"):
            given.choose_as(what)
    without = build(window_size=7)[0]
    with pytest.raises(OptionError, match=r"made with window_size=\d+, this optimizer has window_size=7"):
        without.choose_as(what)


def test_a_folder_is_loaded_after_choose_as(tmp_path):
    saver, loader = trained(), build(budget=MUCH)
    dcp.save({"optimizer": gathered(saver)}, checkpoint_id=tmp_path)
    loader[0].choose_as(tmp_path)
    state = {"optimizer": gathered(loader)}
    dcp.load(state, checkpoint_id=tmp_path)
    set_optimizer_state_dict(loader[1], loader[0], state["optimizer"])
    assert_goes_on(saver, loader)


def test_choose_as_says_what_it_cannot_read(tmp_path):
    optimizer, model, _ = build(budget=MUCH)
    (tmp_path / "bad.bin").write_bytes(b"nonsense")
    torch.save([1], tmp_path / "list.bin")
    dcp.save({"model": model.state_dict()}, checkpoint_id=tmp_path / "model")
    (tmp_path / "empty").mkdir()
    adamw = torch.optim.AdamW(model.parameters())
    train(adamw, list(model.parameters()), 0, 1)
    for what, message in (
        (tmp_path / "none", "none cannot be read"),
        (tmp_path / "bad.bin", "bad.bin cannot be read"),
        (tmp_path / "list.bin", "holds no state dict, but list"),
        (tmp_path / "empty", "no whole checkpoint: it has no index.json, nor .metadata"),
        (tmp_path / "model", "no choice of memory_budget=.* give the options .*: window_size=..., window_format=..."),
        (adamw.state_dict(), "no choice of memory_budget"),
        ({}, "no state was saved"),
    ):
        with pytest.raises(OptionError, match=message):
            optimizer.choose_as(what)
    optimizer.memory_footprint()
    assert chosen(optimizer) == chosen(trained(budget=MUCH)[0])  # nothing was taken
