"""A resumed run goes on with the options that it had, as far as they are not given."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

import hf_efcp
from hf_efcp import OptionError
from hf_efcp.registry import get_optimizer_info
from tests.data.write_checkpoints import CASES, CONTINUED, SAVED, Alone, flat, put, read
from tests.optim.helpers import WINDOWED, clones, differences, pairwise, snapshot, through_a_file, train
from tests.reference import NAMES, info, known_to, parameters, relative

FOLDER = Path(__file__).parents[1] / "data" / "checkpoints_0.1"
NAME = "efcp_lowrank_mfac"
pytestmark = pytest.mark.filterwarnings("ignore:.*assuming the intent is to (load|save) in a single process")


def started_from(name=NAME, params=None, **options):
    """An optimizer with the --optim defaults."""
    params = parameters(dtype=torch.float32) if params is None else params
    options = hf_efcp.optim_defaults(name, **options)
    return hf_efcp.create_optimizer(name, params, lr=0.01, **known_to(name, options)), params


def trained(name=NAME, steps=5, **options):
    optimizer, params = started_from(name, **options)
    train(optimizer, params, 0, steps)
    return optimizer, params


# The --optim defaults of an earlier version.
EARLIER = {"window_size": 32, "update_rms": 0.5, "error_dtype": torch.bfloat16}


@pytest.fixture(autouse=True)
def earlier_defaults(monkeypatch):
    for name in NAMES:
        monkeypatch.setattr(get_optimizer_info(name).cls, "measured", known_to(name, EARLIER))


@pytest.fixture
def other_defaults(monkeypatch):
    """The --optim defaults of a later version; called, it makes them those of a method."""

    def change(name=NAME):
        family = {"damping": 0.1} if info(name).family == "mfac" else {"eps": 0.1}
        options = {"window_size": 16, "rank": 8, "density": 0.5, "error_dtype": torch.float32, "update_rms": 1.0, **family}
        options |= {"metric": "factored", "rms_mode": "adam"}
        kept = {option: value for option, value in options.items() if option in get_optimizer_info(name).options()}
        monkeypatch.setattr(get_optimizer_info(name).cls, "measured", kept)
        return kept

    return change


@WINDOWED
def test_new_defaults_leave_an_old_run_as_it_was(name, other_defaults, caplog):
    saver, params = trained(name)
    changed = other_defaults(name)
    loader, others = started_from(name, clones(params))
    assert loader.options != saver.options
    loader.load_state_dict(through_a_file(saver.state_dict()))
    (line,) = caplog.messages
    assert line.startswith(f"{type(loader).__name__}: options from the checkpoint: ")
    assert all(f"{option}=" in line for option in changed)
    assert loader.options == saver.options
    for optimizer, own in ((saver, params), (loader, others)):
        train(optimizer, own, 5, 12)
    assert differences(snapshot(saver, params), snapshot(loader, others)) == []


@pytest.mark.filterwarnings("ignore:.*saved without its window")
@pytest.mark.parametrize("file", CASES)
def test_new_defaults_leave_a_run_of_0_1_as_it_was(file, other_defaults, caplog):
    name, options = CASES[file]
    saved = read(FOLDER / f"{file}.pt.gz")
    other_defaults(name)
    run = Alone(name, options)
    run.optimizer, _ = started_from(name, run.params)
    run.optimizer.load_state_dict(saved["optimizer"])
    assert "options from the checkpoint: " in caplog.text
    there = {o: value for o, value in saved["optimizer"]["efcp"]["options"].items() if o not in ("shard", "memory_budget")}
    assert {o: getattr(run.optimizer.options, o) for o in there} == there
    put(run.params, saved["before"])
    run.train(SAVED, SAVED + CONTINUED)
    assert relative(flat(run.params) - saved["before"], saved["after"] - saved["before"]) <= 2e-2


@pytest.mark.parametrize(
    ("option", "value"),
    [("window_size", 8), ("rank", 2), ("scope", "layer"), ("error_format", "int8"), ("metric", "tensor")],
)
def test_what_is_given_and_shapes_the_state_is_refused(option, value):
    saver, _ = trained()
    loader, params = trained(**{option: value})
    before = snapshot(loader, params)
    there = getattr(saver.options, option)
    with pytest.raises(
        OptionError, match=f"^checkpoint was made with {option}={there!r}, this optimizer has {option}={value!r}$"
    ):
        loader.load_state_dict(saver.state_dict())
    assert differences(before, snapshot(loader, params)) == []
    train(loader, params, 5, 7)


def test_what_is_given_and_shapes_nothing_wins_and_is_logged(caplog):
    saver, params = trained(damping=1e-3)
    loader, others = started_from(params=clones(params), damping=1e-2, power_iterations=1)
    loader.load_state_dict(saver.state_dict())
    assert loader.options.damping == 1e-2
    assert caplog.messages == ["LowRankMFAC: options this run's and not the checkpoint's: damping=0.01 (not 0.001)"]
    train(loader, others, 5, 7)


def test_both_in_one_line(caplog, other_defaults):
    saver, params = trained(momentum=0.9)
    other_defaults()
    loader, _ = started_from(params=clones(params), damping=1e-2, rank=4)
    loader.load_state_dict(saver.state_dict())
    assert caplog.messages == [
        "LowRankMFAC: options from the checkpoint: error_dtype=bfloat16, window_size=32, momentum=0.9, update_rms=0.5, "
        "rms_mode=constant, metric=none; "
        "this run's and not the checkpoint's: damping=0.01 (not 1e-06)"
    ]


@WINDOWED
def test_a_state_that_goes_out_and_in_again_says_nothing(name, caplog):
    optimizer, params = trained(name, damping=0.1) if info(name).family == "mfac" else trained(name)
    before = snapshot(optimizer, params)
    for _ in range(2):
        optimizer.load_state_dict(optimizer.state_dict())
    fresh, _ = started_from(name)
    fresh.load_state_dict(fresh.state_dict())
    assert caplog.messages == []
    assert differences(before, snapshot(optimizer, params)) == []


@pytest.mark.parametrize(("there", "here"), [("beta1", "window_momentum"), ("window_momentum", "beta1")])
def test_an_option_of_two_names_is_given_by_either(there, here, caplog):
    saver, params = trained("efcp_sparse_ggt", **{there: 0.5})
    loader, others = started_from("efcp_sparse_ggt", clones(params), **{here: 0.7})
    loader.load_state_dict(saver.state_dict())
    assert (getattr(loader.options, here), getattr(loader.options, there)) == (0.7, 0.0)
    assert f"{here}=0.7 (not 0.0)" in caplog.text and f"{there}=0.0 (not 0.5)" in caplog.text
    train(loader, others, 5, 7)


def test_a_fresh_optimizers_checkpoint_decides_on_nothing(other_defaults):
    saved = started_from()[0].state_dict()
    other_defaults()
    loader, params = started_from(window_size=5)
    loader.load_state_dict(saved)
    assert (loader.options.window_size, loader.options.rank) == (5, 8)
    train(loader, params, 0, 3)


def test_an_option_that_is_younger_than_the_checkpoint_has_the_class_default(monkeypatch):
    saver, params = trained()
    saved = saver.state_dict()
    for option in ("divisor", "power_iterations", "preset", "error_format"):
        del saved["efcp"]["options"][option]
    new = {**EARLIER, "divisor": "filled", "power_iterations": 3, "error_format": "int8"}
    monkeypatch.setattr(hf_efcp.LowRankMFAC, "measured", new)
    loader, _ = started_from(params=clones(params))
    loader.load_state_dict(saved)
    assert loader.options == saver.options
    given, _ = started_from(error_format="int8")
    with pytest.raises(OptionError, match="made with error_format='plain', this optimizer has error_format='int8'"):
        given.load_state_dict(saved)


def test_where_a_run_is_is_never_taken():
    """shard, memory_budget and the preset are those of the new run, and comm is: DDP's hook has been registered."""
    saver = hf_efcp.LowRankMFAC(parameters(dtype=torch.float32), 0.01, window_size=4, memory_budget="1GB")
    train(saver, saver.param_groups[0]["params"], 0, 2)
    loader, _ = started_from()
    loader.load_state_dict(saver.state_dict())
    o = loader.options
    assert (o.shard, o.memory_budget, o.preset, o.window_size) == ("auto", None, "measured", 4)
    saved = saver.state_dict()
    saved["efcp"]["options"]["comm"] = "factors"
    loader.load_state_dict(saved)
    assert loader.options.comm == "gradients"


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["deepcopy", "pickle"])
def test_a_copy_knows_what_was_given(copied, other_defaults):
    saver, _ = trained(damping=1e-3)
    other_defaults()
    loader, params = copied(started_from(damping=1e-2, rank=4))
    loader.load_state_dict(saver.state_dict())
    assert (loader.options.damping, loader.options.window_size) == (1e-2, 32)
    train(loader, params, 5, 6)


def test_a_second_checkpoint_decides_anew(other_defaults):
    first, second = trained()[0].state_dict(), trained(window_size=6, momentum=0.5)[0].state_dict()
    other_defaults()
    loader, params = started_from()
    for saved, window, momentum in ((first, 32, 0.0), (second, 6, 0.5), (first, 32, 0.0)):
        loader.load_state_dict(saved)
        assert (loader.options.window_size, loader.options.momentum) == (window, momentum)
        train(loader, params, 5, 6)


# torch.distributed.checkpoint, which does not keep the options -----------------------------------------------------------


def model_and_optimizer(name, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 64), nn.Linear(64, 48))
    return model, *started_from(name, list(model.parameters()), **options)


OTHERS = [{}, {"metric": "factored"}, {"metric": "diagonal"}, {"metric": "tensor"}, {"scope": "layer"}]
OTHERS += [{"window_dtype": "bf16"}, {"error_dtype": None}, {"error_format": "int4"}, {"window_format": "low_bit"}]
BY_SHAPE = ("window_size", "rank", "scope", "metric", "window_format", "error_format")
UNSEEN = ("damping", "eps", "update_rms", "rms_mode")


@pairwise(options=OTHERS, name=["efcp_lowrank_mfac", "efcp_sparse_ggt", "efcp_dense_mfac"], through=["state dict", "folder"])
def test_tensors_tell_what_shapes_them(name, options, through, other_defaults, tmp_path, caplog):
    density = {"density": 0.5} if info(name).compression == "sparse" else {}  # tensors do not tell it
    model, saver, params = model_and_optimizer(name, **options, **density)
    train(saver, params, 0, 3)
    saved = {"optimizer": get_optimizer_state_dict(model, saver)}
    dcp.save(saved, checkpoint_id=tmp_path)
    unseen = {option: getattr(saver.options, option) for option in UNSEEN if hasattr(saver.options, option)}
    other_defaults(name)
    other, loader, others = model_and_optimizer(name, **unseen, **density)
    if through == "folder":
        loader.choose_as(tmp_path)
        saved = {"optimizer": get_optimizer_state_dict(other, loader)}
        dcp.load(saved, checkpoint_id=tmp_path)
    set_optimizer_state_dict(other, loader, saved["optimizer"])
    assert "options from the checkpoint: " in caplog.text
    for option in BY_SHAPE if "error" in loader.state[others[0]] else BY_SHAPE[:-1]:
        assert getattr(loader.options, option, None) == getattr(saver.options, option, None), option
    with torch.no_grad():
        for p, q in zip(others, params, strict=True):
            p.copy_(q)
    for optimizer, own in ((saver, params), (loader, others)):
        train(optimizer, own, 3, 6)
    assert differences(snapshot(saver, params), snapshot(loader, others)) == []


def test_a_given_window_size_that_is_another_there_is_refused():
    model, saver, params = model_and_optimizer(NAME)
    train(saver, params, 0, 3)
    saved = get_optimizer_state_dict(model, saver)
    other, loader, _ = model_and_optimizer(NAME, window_size=9)
    with pytest.raises(OptionError, match="checkpoint was made with window_size=32, this optimizer has window_size=9"):
        loader.choose_as(saved)
    with pytest.raises(OptionError, match=r"window_p is \(32, .* in the checkpoint, \(9, "):
        set_optimizer_state_dict(other, loader, saved)
