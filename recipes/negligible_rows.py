"""How many entries of the window hardly enter the update, and what leaving them out would change. Takes text_classification.py's
arguments:

python recipes/negligible_rows.py --optim efcp_lowrank_mfac --optim_args window_size=128 --max_steps 300
"""

import statistics
import sys

import text_classification
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from hf_efcp.core.coefficients import quadratic

SHARES = (1e-1, 1e-2, 1e-3, 1e-4)


def main(argv: list[str]) -> None:
    """Train, and print the table."""
    dropped = {share: [] for share in SHARES}

    def measure(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        setup = optimizer.setup()
        gram, c = setup.counters, setup.last
        if c is not None and int(gram.step) >= gram.window_size:
            sizes = c.abs() * gram.matrix.diagonal(dim1=-2, dim2=-1).sqrt()  # |c_i| |entry_i|
            for share in SHARES:
                small = sizes < share * sizes.amax(-1, keepdim=True)
                left_out = quadratic(gram.matrix, torch.where(small, c, 0.0)) / quadratic(gram.matrix, c)
                dropped[share].append((small.double().mean().item(), left_out.mean().sqrt().item()))

    register_optimizer_step_post_hook(measure)
    text_classification.main(argv)
    steps = len(dropped[SHARES[0]])
    if not steps:
        raise SystemExit("the window was never full: give more --max_steps, or a smaller window_size")
    print(f"\n{steps} steps with a full window; medians\n")
    print("| entries below this part of the largest | share of all entries | without them u changes by |")
    print("|---|---|---|")
    for share, found in dropped.items():
        rows, change = (statistics.median(part) for part in zip(*found, strict=True))
        print(f"| {share:g} | {rows:.1%} | {change:.2e} of its norm |")


if __name__ == "__main__":
    main(sys.argv[1:])
