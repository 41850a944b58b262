"""Checkpoints of hf_efcp 0.1 load, and the run goes on as it did then. tests/data/write_checkpoints.py wrote them."""

import contextlib
from pathlib import Path

import pytest
import torch

from tests.data.write_checkpoints import CASES, CONTINUED, SAVED, Alone, flat, put, read
from tests.reference import relative

FOLDER = Path(__file__).parents[1] / "data" / "checkpoints_0.1"
# Of an update, relative, since BLAS differs between CPUs. A number that is rounded to few bits may there fall to the other side.
BOUND, BOUND_LOW_BIT = 1e-4, 2e-2


def continued(run, before):
    """The update that the further steps make of the parameters in the file."""
    put(run.params, before)
    run.train(SAVED, SAVED + CONTINUED)
    return flat(run.params) - before


@pytest.mark.parametrize("file", CASES)
def test_an_old_checkpoint_goes_on(file):
    name, options = CASES[file]
    saved = read(FOLDER / f"{file}.pt.gz")
    expected = saved["after"] - saved["before"]
    low_bit = any("low_bit" in str(v) or v == "bf16" for v in saved["optimizer"]["efcp"]["options"].values())
    low_bit |= torch.bfloat16 in {t.dtype for entry in saved["optimizer"]["state"].values() for t in entry.values()}
    run = Alone(name, options)
    without_window = not options.get("save_window", True)
    with pytest.warns(UserWarning, match="without its window") if without_window else contextlib.nullcontext():
        run.optimizer.load_state_dict(saved["optimizer"])
    bound = BOUND_LOW_BIT if low_bit else BOUND
    assert relative(continued(run, saved["before"]), expected) <= bound
    # A state that is lost would be seen.
    assert relative(continued(Alone(name, options), saved["before"]), expected) > 3 * bound


@pytest.mark.filterwarnings("ignore:.*saved without its window")
@pytest.mark.parametrize("file", CASES)
def test_an_old_checkpoint_is_saved_as_it_was(file):
    """Loaded and saved again, every tensor of state has the same bits."""
    name, options = CASES[file]
    old = read(FOLDER / f"{file}.pt.gz")["optimizer"]
    run = Alone(name, options)
    run.optimizer.load_state_dict(old)
    new = run.optimizer.state_dict()
    assert new["state"].keys() == old["state"].keys()
    for i, entry in old["state"].items():
        assert new["state"][i].keys() == entry.keys()
        for key, t in entry.items():
            assert new["state"][i][key].dtype == t.dtype
            assert torch.equal(new["state"][i][key], t), (i, key)
