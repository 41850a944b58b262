"""Resident memory over thousands of training steps of a small model, first and last tenth; each name in a process of its own.

python -m tests.resident_memory --steps 10000 [NAME ...]
"""

import argparse
import gc
import multiprocessing
import statistics

import psutil
import torch
from torch import nn

from hf_efcp import create_optimizer, list_optimizers, optim_defaults, parameter_groups
from hf_efcp.cli.common import table


def resident(name: str, steps: int) -> tuple[float, float, float, float]:
    """Train; give the mean resident MiB of the first and of the last tenth of the steps, and their mean loss."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = nn.Sequential(nn.Embedding(100, 32), nn.Linear(32, 64), nn.LayerNorm(64), nn.GELU(), nn.Linear(64, 100))
    optimizer = create_optimizer(name, parameter_groups(model, weight_decay=0.01), lr=1e-3, **optim_defaults(name))
    footprint, memory, losses, process = optimizer.memory_footprint(), [], [], psutil.Process()
    for _ in range(steps):
        tokens = torch.randint(100, (32,))
        loss = nn.functional.cross_entropy(model(tokens), (tokens * 7 + 3) % 100)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        memory.append(process.memory_info().rss / 2**20)
        losses.append(loss.item())
    gc.collect()
    if optimizer.memory_footprint() != footprint:
        raise RuntimeError(f"{name}: state takes {optimizer.memory_footprint()}, at the start it took {footprint}")
    tenth = max(1, steps // 10)
    means = [statistics.fmean(x) for values in (memory, losses) for x in (values[:tenth], values[-tenth:])]
    return means[0], means[1], means[2], means[3]


def main() -> None:
    """Measure, and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="default: all")
    parser.add_argument("--steps", type=int, default=10_000)
    args = parser.parse_args()
    rows = [("optimizer", "MiB, first tenth of the steps", "MiB, last tenth", "loss, first tenth", "loss, last tenth")]
    for name in args.names or list_optimizers():
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            first, last, *losses = pool.apply(resident, (name, args.steps))
        rows.append((name, f"{first:.2f}", f"{last:.2f}", *(f"{x:.3g}" for x in losses)))
    print(table(rows))


if __name__ == "__main__":
    main()
