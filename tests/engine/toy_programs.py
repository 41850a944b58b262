"""A small model and its data, trained by Trainer and by a plain Accelerate loop: for test_toys_in_programs.py."""

import contextlib
import os

import torch
from accelerate import Accelerator
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

import hf_efcp
from tests import toys
from tests.optim.helpers import snapshot

NAMES = ("efcp_toy_mean", "efcp_toy_factors")
OPTIONS = {
    "efcp_toy_mean": {"density": 0.2, "block_size": 16, "window_size": 4, "window_momentum": 0.5},
    "efcp_toy_factors": {"rank": 2, "error_format": "int8"},
}
# Without rounding, two processes train as one.
EXACT = {name: {**options, "error_format": "plain"} for name, options in OPTIONS.items()}
# The checkpoint lies inside the second epoch of 8 batches, after the window has wrapped around.
STEPS, SAVED = 20, 11


@contextlib.contextmanager
def known_to_transformers():
    """Do for a while what a user does who has a method of their own: register it, then the names with transformers."""
    with toys.registered():
        hf_efcp.register()
        try:
            yield
        finally:
            for name in NAMES:
                _remove_member(name)


def _remove_member(name):
    """Take a name out of OptimizerNames wherever `hf_efcp.integrations.patches` has entered it."""
    by_value = OptimizerNames._value2member_map_
    del OptimizerNames._member_map_[name.upper()], by_value[name]
    delattr(OptimizerNames, name.upper())
    OptimizerNames._member_names_.remove(name.upper())
    if hasattr(OptimizerNames, "_hashable_values_"):
        OptimizerNames._hashable_values_.remove(name)


class Net(nn.Module):
    """A classifier of three classes; matrices, vectors and a norm."""

    def __init__(self, seed=0, dtype=torch.float32):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.first, self.norm, self.last = nn.Linear(12, 40), nn.LayerNorm(40), nn.Linear(40, 3)
        self.to(dtype)

    def forward(self, x, labels):
        """Give the loss and the scores, as models of transformers do."""
        scores = self.last(self.norm(self.first(x.to(self.first.weight.dtype))).tanh())
        return {"loss": nn.functional.cross_entropy(scores, labels), "logits": scores}


def examples():
    """128 inputs, and classes that depend on them."""
    inputs = torch.randn(128, 12, generator=torch.Generator().manual_seed(0))
    return [{"x": x, "labels": y} for x, y in zip(inputs, inputs[:, :3].argmax(-1), strict=True)]


def trainer(folder, name, cls=Trainer, arguments=TrainingArguments, seed=0, dtype=torch.float32, **given):
    """A Trainer of a new model, which writes to the folder."""
    common = {
        "optim": name,
        "optim_args": OPTIONS[name],
        "learning_rate": 0.1,
        "weight_decay": 0.01,
        "max_steps": STEPS,
        "save_steps": SAVED,
        "logging_steps": 1,
        "per_device_train_batch_size": 16,
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
    }
    return cls(Net(seed, dtype), arguments(str(folder), **{**common, **given}), train_dataset=examples())


def probabilities(params):
    """Give the logarithms of the classes' probabilities under these fp64 parameters.

    Parameters themselves may differ by a shift of all classes' scores, which has no gradient: there rounding errors grow.
    """
    net = Net(dtype=torch.float64)
    with torch.no_grad():
        for p, value in zip(net.parameters(), params, strict=True):
            p.copy_(value)
        return net(**torch.utils.data.default_collate(examples()))["logits"].log_softmax(-1)


def losses(made):
    """The losses that were logged."""
    return [entry["loss"] for entry in made.state.log_history if "loss" in entry]


def everything(made):
    """Parameters, the state that this process has, groups and losses."""
    return {**snapshot(made.optimizer.optimizer, list(made.model.parameters())), "losses": losses(made)}


def loop(accelerator, name, seed, dtype=torch.float32):
    """A model and its optimizer, prepared."""
    model = Net(seed, dtype)
    optimizer = hf_efcp.create_optimizer(name, model, lr=0.1, **hf_efcp.optim_defaults(name, **OPTIONS[name]))
    return accelerator.prepare(model, optimizer)


def advance(accelerator, model, optimizer, start, stop):
    """Steps start ... stop - 1 on this process's share of the batches; returns the losses."""
    batches, losses = torch.utils.data.default_collate(examples()), []
    for t in range(start, stop):
        mine = slice(16 * (t % 8) + accelerator.process_index, 16 * (t % 8) + 16, accelerator.num_processes)
        loss = model(batches["x"][mine], batches["labels"][mine])["loss"]
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


# On two processes --------------------------------------------------------------------------------------------------------


def launched(rank):
    """Set what a launcher of two processes sets."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
    os.environ["ACCELERATE_USE_CPU"] = "true"
    toys.register()
    hf_efcp.register()


def trained_by_two(rank, folder):
    """Trainer under DDP: train, then go on from the checkpoint. Name -> the ends of both runs, and the plan of the state."""
    launched(rank)
    results = {}
    for name in NAMES:
        given = {"per_device_train_batch_size": 8, "optim_args": EXACT[name], "dtype": torch.float64}
        out, again = (trainer(f"{folder}/{name}/{part}", name, **given) for part in ("out", "again"))
        out.train()
        out.accelerator.wait_for_everyone()
        again.train(resume_from_checkpoint=f"{folder}/{name}/out/checkpoint-{SAVED}")
        plan = again.optimizer.optimizer.sharding_plan()
        results[name] = everything(out), everything(again), plan, type(again.model_wrapped).__name__
    return results


def divided_between_two(rank, folder):
    """An Accelerate loop under FSDP2: train, save, go on; then the same from what was saved. Name -> losses of both ends."""
    from accelerate.state import PartialState
    from accelerate.utils import FullyShardedDataParallelPlugin

    from tests.integration.fsdp_on_cpu import as_gpus

    launched(rank)
    PartialState.__init__ = as_gpus
    os.environ["ACCELERATE_USE_FSDP"] = "true"
    results = {}
    for name in NAMES:
        sharded = {"state_dict_type": "SHARDED_STATE_DICT", "cpu_ram_efficient_loading": False}
        accelerator = Accelerator(cpu=True, fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=2, **sharded))
        run = accelerator, *loop(accelerator, name, 0, torch.float64)
        first = advance(*run, 0, SAVED)
        accelerator.save_state(f"{folder}/{name}")
        accelerator.wait_for_everyone()
        end = advance(*run, SAVED, STEPS)
        accelerator.free_memory()
        run = accelerator, *loop(accelerator, name, 1, torch.float64)
        accelerator.load_state(f"{folder}/{name}")
        divided = all(hasattr(p, "device_mesh") for p in run[1].parameters())
        results[name] = first, end, advance(*run, SAVED, STEPS), divided
        accelerator.free_memory()
    return results
