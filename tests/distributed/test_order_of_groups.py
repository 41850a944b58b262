"""Checkpoints of two processes, DDP's folder of shards and FSDP2's: groups in the former order, and other parameters."""

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from hf_efcp import OptionError
from hf_efcp.integrations.checkpoints import load_fsdp
from tests.data.write_checkpoints import CONTINUED, SAVED, flat, put, read
from tests.data.write_grouped_checkpoints import DISTRIBUTED, RUNS
from tests.distributed.processes import run
from tests.optim.test_order_of_groups import BOUND, FOLDER
from tests.reference import relative


def continued(rank):
    """The update that the further steps make, and that of a fresh optimizer."""
    updates = {}
    for file, name in DISTRIBUTED.items():
        saved, resumed, fresh = read(FOLDER / file / "run.pt.gz"), RUNS[file](name, {}), RUNS[file](name, {})
        if file == "fsdp2":
            state = {"optimizer": get_optimizer_state_dict(resumed.model, resumed.optimizer)}
            dcp.load(state, checkpoint_id=FOLDER / file / "dcp")
            set_optimizer_state_dict(resumed.model, resumed.optimizer, state["optimizer"])
        else:
            resumed.optimizer.shard_folder = FOLDER / file / "efcp_optim"
            resumed.optimizer.load_state_dict(saved["optimizer"])
        assert [g["kind"] for g in resumed.optimizer.param_groups] == ["matrix", "vector", "embedding", "head"]
        for each in (resumed, fresh):
            put(each.params, saved["before"])
            each.train(SAVED, SAVED + CONTINUED)
        updates[file] = [flat(each.params) - saved["before"] for each in (resumed, fresh)]
    return updates


def test_checkpoints_of_the_former_order_go_on():
    first, second = run(2, continued)
    for file, (update, fresh) in first.items():
        saved = read(FOLDER / file / "run.pt.gz")
        expected = saved["after"] - saved["before"]
        assert torch.equal(update, second[file][0])
        assert relative(update, expected) <= BOUND, file
        assert relative(fresh, expected) > 3 * BOUND, file  # a state that is lost would be seen


def refused(rank, folder):
    """The messages of loading what has been saved by a run that trains all but the head."""
    messages = {}
    for file, name in DISTRIBUTED.items():
        fewer, all_ = RUNS[file](name, {}, frozen=("head.weight",)), RUNS[file](name, {})
        fewer.train(0, 2)
        all_.train(0, 2)
        here, saved = folder / file, None
        if file == "fsdp2":
            dcp.save({"optimizer": get_optimizer_state_dict(fewer.model, fewer.optimizer)}, checkpoint_id=here / "optimizer_0")
        else:
            fewer.optimizer.save_shards(here)
            saved = fewer.optimizer.state_dict()
        try:
            if file == "fsdp2":
                load_fsdp(never)(None, None, all_.optimizer, all_.model, here)
            else:
                all_.optimizer.shard_folder = here
                all_.optimizer.load_state_dict(saved)
        except OptionError as error:
            messages[file] = str(error)
    return messages


def never(*args):
    raise AssertionError("torch is asked to load")


def test_other_parameters_are_named_on_every_process(tmp_path):
    for messages in run(2, refused, tmp_path):
        assert messages.keys() == DISTRIBUTED.keys()
        assert all("other parameters; trained here and not there: head.weight" in text for text in messages.values())
