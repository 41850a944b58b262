"""Time a step of DASH, whose blocks of one size are handled together, beside a loop over the same blocks in plain torch.

    OMP_NUM_THREADS=1 python -m tests.dash_times [--shape 768 3072] [--block_size 128] [--root_method newton] [--steps 10]

Both take turns, and invert in every step unless `--interval` says otherwise. CPU time of one thread, or with `--device cuda` wall
time until the GPU is done: medians, and the median of the ratios of steps side by side.
"""

import argparse
import statistics
import time

import torch
from torch import nn

from hf_efcp import DASH
from hf_efcp.core.inverse_roots import METHODS


class Block:
    """One block, step by step: the equations of docs/dash.md."""

    def __init__(self, g, o):
        self.g, self.o, self.t, self.p = g, o, 0, torch.zeros_like(g)
        self.left, self.right = g.new_zeros(len(g), len(g)), g.new_zeros(g.shape[1], g.shape[1])
        self.m, self.v = torch.zeros_like(g), torch.zeros_like(g)

    def step(self, lr):
        g, o, self.t = self.g, self.o, self.t + 1
        self.left.mul_(o.shampoo_beta).add_(g @ g.T, alpha=1 - o.shampoo_beta)
        self.right.mul_(o.shampoo_beta).add_(g.T @ g, alpha=1 - o.shampoo_beta)
        self.m.lerp_(g, 1 - o.beta1)
        self.v.mul_(o.beta2).addcmul_(g, g, value=1 - o.beta2)
        if self.t == 1 or self.t % o.inverse_root_interval == 0:
            self.roots = [o.root(x[None], 4)[0] for x in (self.left, self.right)]
        adam = (self.m / (1 - o.beta1**self.t)) / ((self.v / (1 - o.beta2**self.t)).sqrt() + o.eps)
        u = self.roots[0] @ self.m @ self.roots[1]
        self.p.sub_(u * (adam.norm() / (u.norm() + 1e-16)), alpha=lr)


def seconds(call, device):
    """CPU time of this thread for a call, or wall time until the GPU is done."""
    clock = time.thread_time if device == "cpu" else time.perf_counter
    wait = (lambda: None) if device == "cpu" else torch.cuda.synchronize
    wait()
    began = clock()
    call()
    wait()
    return clock() - began


def parse(argv=None):
    """The command's arguments."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", type=int, nargs=2, default=(768, 3072))
    parser.add_argument("--block_size", type=int, default=128)
    parser.add_argument("--root_method", default="eigh", choices=METHODS)
    parser.add_argument("--interval", type=int, default=1)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    return parser.parse_args(argv)


def main():
    given = parse()
    torch.set_num_threads(1)
    gradient = torch.randn(given.shape, generator=torch.Generator().manual_seed(0)).to(given.device)
    whole = nn.Parameter(torch.zeros_like(gradient))
    whole.grad = gradient
    options = {"block_size": given.block_size, "root_method": given.root_method, "inverse_root_interval": given.interval}
    together = DASH([whole], lr=1e-3, **options)
    rows = [[Block(g, together.options) for g in part.split(given.block_size, 1)] for part in gradient.split(given.block_size)]

    def loop():
        for row in rows:
            for block in row:
                block.step(1e-3)

    pairs = [(seconds(together.step, given.device), seconds(loop, given.device)) for _ in range(given.steps + 1)][1:]
    apart = torch.cat([torch.cat([block.p for block in row], 1) for row in rows])
    a, b = (1e3 * statistics.median(times) for times in zip(*pairs, strict=True))
    ratio = statistics.median(b / a for a, b in pairs)
    difference = float((apart - whole.detach()).norm() / apart.norm())
    print(f"{sum(map(len, rows))} blocks of {given.block_size}, {given.root_method}: together {a:.1f} ms, in a loop {b:.1f} ms")
    print(f"ratio {ratio:.2f}; relative difference of the results {difference:.1e}")


if __name__ == "__main__":
    main()
