"""Times of x D by the matrix and by the Fourier transform, by which `dct.FFT_FROM` was chosen: `python -m hf_efcp.bench.dct`."""

from __future__ import annotations

import argparse

import torch

from ..cli.common import table
from ..core import dct
from ..core.linalg import ieee_matmul
from .measuring import cpu_time, machine, seconds

_SIZES = "64,128,256,384,512,768,1000,1024,1536,2048,3072,4096"
# Numbers that are transformed at once.
_NUMBERS = 2**20


def measured(size: int, device: torch.device, repeats: int) -> dict[str, float]:
    """Give the nanoseconds for each number of x (rows, size) in fp32, by method: the least of the repeats, which take turns."""
    x = torch.randn(max(1, _NUMBERS // size), size, device=device)
    times: dict[str, list[float]] = {"matmul": [], "fft": []}
    with ieee_matmul(device):
        for method in times:
            dct.transform(x, method)
        for _ in range(repeats):
            for method, seen in times.items():
                seen.append(seconds(lambda method=method: dct.transform(x, method), device))  # type: ignore[misc]
    return {method: min(seen) * 1e9 / x.numel() for method, seen in times.items()}


def main(argv: list[str] | None = None) -> None:
    """Print the table of docs/benchmarks/dct.md."""
    parser = argparse.ArgumentParser(prog="python -m hf_efcp.bench.dct", description=__doc__)
    parser.add_argument("--sizes", default=_SIZES, help="sizes of the basis")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--repeats", type=int, default=10, help="calls of each, of which the fastest counts")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    rows = [["size", "matmul, ns a number", "fft, ns a number", "matmul / fft"]]
    with cpu_time(device.type == "cpu"):
        for size in map(int, args.sizes.split(",")):
            ns = measured(size, device, args.repeats)
            rows.append([f"{size}", *(f"{x:.2f}" for x in ns.values()), f"{ns['matmul'] / ns['fft']:.2f}"])
    print(f"{machine(device)}\n")
    print(table(rows))


if __name__ == "__main__":
    main()
