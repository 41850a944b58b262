"""Where a step's time goes on a GPU: the host's part, the whole, and what each kernel takes; with a CUDA graph and without.

python recipes/step_profile.py --model bert-base --optim efcp_lowrank_mfac,efcp_sparse_mfac

HF_EFCP_CUDA_GRAPH=1, which the recipe sets by turns, is timed with gradients that stay where they are, and with gradients that
are elsewhere in each step, as after zero_grad(set_to_none=True). Medians.
"""

import argparse
import os
import statistics
import time

import torch
from torch.profiler import ProfilerActivity, profile

from hf_efcp.bench.contenders import Workload
from hf_efcp.bench.measuring import machine
from hf_efcp.cli.common import build, chosen
from hf_efcp.cli.shapes import load

WARMUP, PROFILED, SHOWN = 6, 3, 25


def parse(argv=None) -> argparse.Namespace:
    """The command's arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bert-base", help="as `hf-efcp bench` takes it")
    parser.add_argument("--optim", default="efcp_lowrank_mfac,efcp_sparse_mfac", help="names with commas between them")
    parser.add_argument("--optim_args", default="", help="on top of the --optim defaults")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--device", default="cuda")
    return parser.parse_args(argv)


def timed(work: Workload, optimizer: torch.optim.Optimizer, steps: int, moving: bool = False) -> tuple[float, float]:
    """Milliseconds until `step()` returns, and until the device is done; `moving`: gradients are elsewhere in each step."""
    wait = torch.cuda.synchronize if work.device.type == "cuda" else lambda: None
    host, whole = [], []
    for _ in range(steps):
        if moving:  # the new ones are there before the old ones go
            for p, g in [(p, torch.empty_like(p)) for p in work.params]:
                p.grad = g
        work.new_gradients()
        wait()
        start = time.perf_counter()
        optimizer.step()
        host.append(time.perf_counter() - start)
        wait()
        whole.append(time.perf_counter() - start)
    return 1e3 * statistics.median(host), 1e3 * statistics.median(whole)


def held_by_graphs() -> float:
    """MiB of the memory that graphs keep to themselves."""
    own = [segment for segment in torch.cuda.memory_snapshot() if tuple(segment["segment_pool_id"]) != (0, 0)]
    return sum(segment["total_size"] for segment in own) / 2**20


def kernels(optimizer: torch.optim.Optimizer, device: torch.device) -> list[tuple[float, float, str]]:
    """Milliseconds and launches a step of everything that ran on the device, the longest first."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        for _ in range(PROFILED):
            optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
    events = [e for e in profiled.key_averages() if e.device_type == torch.autograd.DeviceType.CUDA]
    found = [(e.self_device_time_total / 1e3 / PROFILED, e.count / PROFILED, e.key) for e in events]
    return sorted(((ms, count, key) for ms, count, key in found if not key.startswith("Optimizer.")), reverse=True)


def main(argv=None) -> None:
    """The command."""
    args = parse(argv)
    device = torch.device(args.device)
    print(f"{args.model}, {args.optim_args or 'defaults'}; {machine(device)}")
    for name, options in chosen(args.optim, args.optim_args).items():
        for graph in ("0", "1") if device.type == "cuda" else ("0",):
            os.environ["HF_EFCP_CUDA_GRAPH"] = graph
            work = Workload(load(args.model, torch.float32), device)
            optimizer = build(name, options, work.model, None)
            for _ in range(WARMUP):
                work.new_gradients()
                optimizer.step()
            host, whole = timed(work, optimizer, args.steps)
            print(f"\n{name}, {'a CUDA graph' if graph == '1' else 'no graph'}: host {host:.2f} ms, whole step {whole:.2f} ms")
            if graph == "1":
                host, whole = timed(work, optimizer, args.steps, moving=True)
                print(f"gradients that move: host {host:.2f} ms, whole step {whole:.2f} ms; memory {held_by_graphs():.0f} MiB")
            else:
                rows = kernels(optimizer, device)
                print(f"on the device: {sum(ms for ms, _, _ in rows):.2f} ms, {sum(count for _, count, _ in rows):.0f} launches")
                for ms, count, key in rows[:SHOWN]:
                    print(f"  {ms:7.3f} ms {count:6.1f}  {key[:100]}")


if __name__ == "__main__":
    main()
