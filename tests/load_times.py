"""Time loading and saving of an optimizer's state beside a plain copy of the same tensors into fresh memory.

    OMP_NUM_THREADS=1 python tests/load_times.py [--optim efcp_lowrank_mfac] [--model bert-base] [--steps 0] [--rounds 15]

State of the `--optim` defaults. A plain load makes a fresh optimizer's state and copies each entry to its place, nothing more.
The kinds take turns, so that other work on the machine meets all of them. CPU time of one thread: the least, the median, and the
median of the ratios to the plain load of the same round. `--steps`: that were taken before, so that K is formed anew when it is
loaded; 0: the state is filled with numbers that a checkpoint may have, and K stays empty.
"""

import argparse
import statistics
import time

import torch
from torch import nn

import hf_efcp
from hf_efcp.cli.shapes import BUILT_IN


def seconds(call):
    """CPU time of this thread for a call, whose result is freed afterwards."""
    began = time.thread_time()
    kept = call()
    took = time.thread_time() - began
    del kept
    return took


def optimizer_for(name, params):
    return hf_efcp.create_optimizer(name, params, lr=1e-4, **hf_efcp.optim_defaults(name))


def plain_load(optimizer, saved):
    """Make the state and copy each entry to its place; give the optimizer."""
    views = optimizer.setup().views().values()
    for view, entry in zip(views, saved["state"].values(), strict=True):
        for name, t in entry.items():
            view[name].copy_(t)
    return optimizer


def load(optimizer, saved):
    """Load and give the optimizer."""
    optimizer.load_state_dict(saved)
    return optimizer


def filled(optimizer, steps):
    """The optimizer's state dict, with numbers in it."""
    for step in range(steps):
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
        optimizer.step()
    if not steps:
        for entry in optimizer.setup().views().values():
            for name, t in entry.items():
                if t.is_floating_point() and name not in ("gram", "step"):
                    t.fill_(1e-3)
    return optimizer.state_dict()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--optim", default="efcp_lowrank_mfac")
    parser.add_argument("--model", default="bert-base", choices=[*BUILT_IN])
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    params = [nn.Parameter(torch.zeros(shape)) for shape in BUILT_IN[arguments.model]().values()]
    optimizer = optimizer_for(arguments.optim, params)
    saved = filled(optimizer, arguments.steps)
    tensors = [t for entry in saved["state"].values() for t in entry.values()]
    kinds = {
        "a plain copy": lambda: [torch.empty_like(t).copy_(t) for t in tensors],
        "a plain load": lambda: plain_load(optimizer_for(arguments.optim, params), saved),
        "load_state_dict, fresh": lambda: load(optimizer_for(arguments.optim, params), saved),
        "load_state_dict, running": lambda: load(optimizer, saved),
        "state_dict": optimizer.state_dict,
    }
    times = {kind: [] for kind in kinds}
    for number in range(arguments.rounds + 1):
        for kind, call in kinds.items():
            took = seconds(call)
            if number:  # the first round warms up
                times[kind].append(took)
    print(f"{arguments.optim}, {arguments.model}: {sum(t.nbytes for t in tensors) / 1e6:.0f} MB in {len(tensors):,} tensors\n")
    print("| | least, s | median, s | times a plain load |\n|---|---|---|---|")
    for kind, values in times.items():
        ratio = statistics.median(x / y for x, y in zip(values, times["a plain load"], strict=True))
        print(f"| {kind} | {min(values):.3f} | {statistics.median(values):.3f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
