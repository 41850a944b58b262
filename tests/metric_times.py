"""Measure what an option adds to a step: two optimizers on a model's shapes, with and without it, step by turns.

    OMP_NUM_THREADS=1 python tests/metric_times.py [--rounds 21] [--windows 32 128] [--metric factored]
    OMP_NUM_THREADS=1 python tests/metric_times.py --option residual --windows 16
    OMP_NUM_THREADS=1 python tests/metric_times.py --option bf16 --windows 16
    python tests/metric_times.py --device cuda --model bert-base --windows 16 32 128

On a CPU: CPU time of one thread, so that other work on the machine disturbs less. On a GPU: wall time, from an idle device to an
idle device. The ratio is the median of the ratios of pairs.
"""

import argparse
import statistics
import time

import torch
from trajectories import FP32, gradients, start

import hf_efcp
from hf_efcp.cli.shapes import BUILT_IN

OPTIONS = {"update_rms": 1.0, "error_dtype": "bf16", "damping": 0.1, "damping_mode": "relative", "window_momentum": 0.9}
# Option -> how one and the other optimizer begin from the --optim defaults.
CHANGES = {
    "residual": ({"residual": "feedback"}, {}),
    "bf16": ({"window_dtype": None, "window_update_dtype": None}, {}),
}
WARM_UP = 4


def built(name, window_size, arguments, **options):
    """An optimizer on a model's shapes."""
    params = start(FP32, BUILT_IN[arguments.model]().values())
    params = [torch.nn.Parameter(p.detach().to(arguments.device)) for p in params]
    return hf_efcp.create_optimizer(name, params, lr=1e-4, window_size=window_size, **options)


def drawn(params, step):
    """New gradients, on a GPU drawn there."""
    if params[0].device.type == "cpu":
        return gradients(params, step)
    generator = torch.Generator(params[0].device).manual_seed(1000 + step)
    return [0.1 * torch.randn(p.shape, generator=generator, device=p.device) + 0.02 * p.detach() for p in params]


def now(device):
    """Seconds of CPU time, or of wall time once the GPU is idle."""
    if device == "cpu":
        return time.thread_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def step_time(optimizer, grads):
    """Milliseconds of a step."""
    params = optimizer.param_groups[0]["params"]
    for p, g in zip(params, grads, strict=True):
        p.grad = g
    began = now(params[0].device.type)
    optimizer.step()
    return 1e3 * (now(params[0].device.type) - began)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--windows", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--option", choices=["metric", *CHANGES], default="metric")
    parser.add_argument("--metric", default="factored")
    parser.add_argument("--model", default="minilm", choices=BUILT_IN)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print("| optimizer | m | without, ms | with, ms | ratio |\n|---|---|---|---|---|")
    if arguments.option == "metric":
        changes = [{**OPTIONS, "metric": "none"}, {**OPTIONS, "metric": arguments.metric}]
    else:
        changes = [{"preset": "measured", **change} for change in CHANGES[arguments.option]]
    for name in ("efcp_lowrank_mfac", "efcp_sparse_mfac"):
        if name == "efcp_sparse_mfac" and arguments.option == "bf16":
            continue
        for window_size in arguments.windows:
            pair = [built(name, window_size, arguments, **change) for change in changes]
            times = []
            for i in range(WARM_UP + arguments.rounds):
                grads = drawn(pair[0].param_groups[0]["params"], i)  # the same ones again would be a special case
                times.append([step_time(optimizer, grads) for optimizer in pair])
            times = times[WARM_UP:]
            ratio = statistics.median(b / a for a, b in times)
            without, with_ = (statistics.median(column) for column in zip(*times, strict=True))
            print(f"| {name} | {window_size} | {without:.1f} | {with_:.1f} | {ratio:.3f} |", flush=True)


if __name__ == "__main__":
    main()
