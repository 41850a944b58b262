"""Measure steps on many small tensors on a CPU, beside AdamW (foreach): in many groups, of many shapes, and the first step.

    OMP_NUM_THREADS=1 python tests/many_tensors.py [--rounds 7] [--presets measured paper] [--optim NAME ...]

CPU time of one thread, so that other work on the machine disturbs less; the least of the rounds. The preset `paper` has a window
of 128 here.
"""

import argparse
import time

import torch
from torch import nn

import hf_efcp
from hf_efcp.registry import get_optimizer_info

# Case -> shapes, and whether each tensor has a group of its own.
CASES = {
    "465 tensors, one group": ([(32, 32)] * 465, False),
    "465 tensors, 465 groups": ([(32, 32)] * 465, True),
    "2,000 shapes": ([(8 + i % 50, 8 + i // 50) for i in range(2000)], False),
    "10,000 tensors": ([(16, 16)] * 10_000, False),
}


def seconds(call):
    """CPU time of this thread."""
    began = time.thread_time()
    call()
    return time.thread_time() - began


def measured(make, case, rounds):
    """The first step and the least of the others, in seconds."""
    shapes, apart = CASES[case]
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(0.02 * torch.randn(shape, generator=generator)) for shape in shapes]
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)
    groups = [{"params": [p], "lr": 1e-4 * (1 + i / 1000)} for i, p in enumerate(params)] if apart else params
    optimizer = make(groups)
    first, times = seconds(optimizer.step), []
    for _ in range(rounds):
        for p in params:
            p.grad = p.grad.roll(1)
        times.append(seconds(optimizer.step))
    return first, min(times)


def ours(name, preset):
    """What makes an optimizer."""
    window = {"window_size": 128} if preset == "paper" and get_optimizer_info(name).family == "mfac" else {}
    return lambda groups: hf_efcp.create_optimizer(name, groups, lr=1e-4, preset=preset, **window)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--presets", nargs="+", default=["measured", "paper"])
    parser.add_argument("--optim", nargs="+", default=["efcp_lowrank_mfac", "efcp_sparse_mfac"])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print("| tensors | optimizer | preset | first step, s | a step, ms | AdamW, ms | ratio |\n|---|---|---|---|---|---|---|")
    for case in CASES:
        _, adamw = measured(lambda groups: torch.optim.AdamW(groups, lr=1e-4, foreach=True), case, arguments.rounds)
        for name in arguments.optim:
            for preset in arguments.presets:
                first, step = measured(ours(name, preset), case, arguments.rounds)
                figures = f"{first:.2f} | {1e3 * step:.1f} | {1e3 * adamw:.1f} | {step / adamw:.1f}"
                print(f"| {case} | {name} | {preset} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
