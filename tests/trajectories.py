"""Run every optimizer in every format and placement, and write down a hash of every tensor of every step.

    PYTHONPATH=TREE python tests/trajectories.py OUT.pt STEPS one|several

compare_trajectories.py runs this file on two trees, so the file asks for nothing but hf_efcp's public functions, which both have.
OUT.pt holds {(optimizer, format, placement, rank): {"hashes": [{entry: hash} of every step], "end": the parameters, fp64}}.
"""

import datetime
import hashlib
import inspect
import logging
import os
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import hf_efcp
from hf_efcp.registry import get_optimizer_info

# As in tests/reference.py, which is of one tree only; and a matrix that is larger than all others together.
SHAPES = ((7,), (12, 30), (12, 30), (40, 11), (8, 3, 3, 3), (3, 4), (), (64, 96))
LOSSY = {"rank": 2, "density": 0.2, "block_size": 16}  # of these options a method takes the ones that it has
USUAL = {"lr": 0.01, "window_size": 6, "update_rms": 0.1}
BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
LOW_BIT = {"window_format": "low_bit"}
MOMENTUM = {"momentum": 0.5, "weight_decay": 0.1}

# Name of the format -> dtype of the parameters, options. "events": what happens during the run, see `Run`.
FORMATS = {
    "fp64": (FP64, {}),
    "fp64, raw update": (FP64, {"update_rms": None, "lr": 1e-4, "damping": 1e-2, "eps": 1e-2}),
    "fp64, layer": (FP64, {"scope": "layer"}),
    "fp64, momentum, decoupled decay": (FP64, MOMENTUM),
    "fp64, momentum, l2 decay, window momentum": (FP64, {**MOMENTUM, "weight_decay_mode": "l2", "window_momentum": 0.5}),
    "fp64, method's options": (
        FP64,
        {"damping_mode": "relative", "damping": 1e-2, "divisor": "filled", "beta1": 0.5, "beta2": 0.9, "power_iterations": 2},
    ),
    "fp64, no kernels": (FP64, {"kernels": False}),
    "fp32": (FP32, {}),
    "fp32, no kernels": (FP32, {"kernels": False}),
    "fp32, layer, momentum": (FP32, {"scope": "layer", "momentum": 0.5}),
    "fp32, bf16 window and error": (FP32, {"window_dtype": "bf16", "error_dtype": "bf16"}),
    "fp32, bf16 window and error, no kernels": (FP32, {"window_dtype": "bf16", "error_dtype": "bf16", "kernels": False}),
    "fp32, low-bit window, int8 error": (FP32, {**LOW_BIT, "error_format": "int8"}),
    "fp32, low-bit window, int4 error": (FP32, {**LOW_BIT, "error_format": "int4"}),
    "fp32, low-bit window, int4 error, no kernels": (FP32, {**LOW_BIT, "error_format": "int4", "kernels": False}),
    "fp32, memory budget": (FP32, {"memory_budget": 300_000, "window_size": None, "rank": None, "density": None}),
    "bf16, stochastic rounding": (BF16, {"stochastic_rounding": True, "error_dtype": "bf16"}),
    "fp32, not finite": (FP32, {"events": "nan"}),
    "fp32, absent gradients": (FP32, {"events": "absent"}),
    "fp32, closure": (FP32, {"events": "closure"}),
    "fp32, new group": (FP32, {"events": "group"}),
    "fp32, uncompressed group": (FP32, {"events": "uncompressed"}),
}
SEVERAL_FORMATS = {
    name: FORMATS[name]
    for name in (
        "fp64",
        "fp64, layer",
        "fp64, momentum, l2 decay, window momentum",
        "fp32, bf16 window and error",
        "fp32, low-bit window, int4 error",
        "fp32, not finite",
    )
}


def built(name, params, options, **more):
    """The optimizer: the options that its method has; a None takes an option of USUAL or LOSSY away."""
    has = get_optimizer_info(name).options()
    given = {k: v for k, v in {**USUAL, **LOSSY, **options}.items() if k in has}
    given = {k: v for k, v in given.items() if v is not None or k == "update_rms"}
    return hf_efcp.create_optimizer(name, params, **given, **more)


def start(dtype, shapes=SHAPES):
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(s, generator=generator, dtype=FP64).to(dtype)) for s in shapes]


def gradients(params, step):
    """Noise and a little of the parameter, so that runs whose parameters differ drift apart."""
    generator = torch.Generator().manual_seed(1000 + step)
    return [(0.1 * torch.randn(p.shape, generator=generator, dtype=FP64) + 0.02 * full(p).double()).to(p.dtype) for p in params]


def full(t):
    """The tensor as one process has it; collective where it is divided."""
    return (t.full_tensor() if hasattr(t, "full_tensor") else t).detach()


def bytes_hash(t):
    t = (t.to_local() if hasattr(t, "to_local") else t).detach().contiguous().reshape(-1)
    return hashlib.blake2b(t.view(torch.uint8).numpy().tobytes(), digest_size=8).hexdigest() + f" {t.dtype} {t.numel()}"


class Run:
    """One optimizer on one configuration, step by step, with the hashes.

    Events, all in the middle third of the run: `nan`, a gradient that is not finite; `absent`, a parameter without a gradient in
    every second step; `closure`, gradients that a closure makes; `group`, two parameters that join; `uncompressed`, one of two
    groups enters the window uncompressed.
    """

    def __init__(self, optimizer, params, steps, events=None):
        self.optimizer, self.params, self.steps, self.events = optimizer, params, steps, events
        self.hashes = []
        self.start = self.end()

    def set_gradients(self, step):
        middle = self.steps // 3 <= step < 2 * self.steps // 3
        for i, (p, g) in enumerate(zip(self.params, gradients(self.params, step), strict=True)):
            if self.events == "nan" and i == 1 and step == self.steps // 2:
                g[0, 0] = torch.nan
            absent = self.events == "absent" and middle and i in (2, 3) and step % 2
            p.grad = None if absent else self.divided(g, p)

    def divided(self, g, p):
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(g, p.device_mesh, p.placements) if hasattr(p, "device_mesh") else g

    def step(self, step):
        if self.events == "group" and step == self.steps // 2:
            joined = [nn.Parameter(p.detach() + 1) for p in start(self.params[0].dtype, ((12, 30), (5,)))]
            self.optimizer.add_param_group({"params": joined, "lr": 0.02})
            self.params = [*self.params, *joined]
        if self.events == "closure":
            self.optimizer.step(lambda: self.set_gradients(step))
        else:
            self.set_gradients(step)
            self.optimizer.step()

    def all(self):
        for step in range(self.steps):
            self.step(step)
            self.write_down()
        return self.result()

    def write_down(self):
        tensors = {f"parameter {i}": p for i, p in enumerate(self.params)}
        if dist.is_initialized():  # where the state_dict may be a stub: what this process holds
            entries = {i: self.optimizer.state.get(p, {}) for i, p in enumerate(self.params)}
        else:
            entries = self.optimizer.state_dict()["state"]
        tensors |= {f"state {i} {k}": t for i, entry in entries.items() for k, t in entry.items()}
        self.hashes.append({name: bytes_hash(t) for name, t in tensors.items() if isinstance(t, torch.Tensor)})

    def end(self):
        return torch.cat([full(p).double().flatten() for p in self.params])

    def result(self):
        end = self.end()
        if not end.isfinite().all() or torch.equal(end[: len(self.start)], self.start):
            raise RuntimeError("a run that does not move or is not finite compares nothing")
        return {"hashes": self.hashes, "end": end}


def one_process(name, dtype, options, steps):
    options = dict(options)
    events, kernels = options.pop("events", None), options.pop("kernels", True)
    os.environ["HF_EFCP_KERNELS"] = str(int(kernels))
    params = start(dtype)
    groups = params
    if events == "uncompressed":
        groups = [{"params": params[:3]}, {"params": params[3:], "compress": False, "lr": 0.02, "weight_decay": 0.1}]
    return Run(built(name, groups, options), params, steps, events).all()


# Several processes --------------------------------------------------------------------------------------------------------


def on_ddp_shards(name, dtype, options, steps):
    options = dict(options)
    events, params = options.pop("events", None), start(dtype)
    return Run(built(name, params, options, process_group=dist.group.WORLD), params, steps, events).all()


class Tensors(nn.Module):
    """Parameters alone; its loss has the gradients that are given, and a pull to zero."""

    def __init__(self, dtype, shapes):
        super().__init__()
        self.tensors = nn.ParameterList(start(dtype, shapes))

    def forward(self, gradients):
        return sum((p * g).sum() + 0.01 * p.square().sum() for p, g in zip(self.tensors, gradients, strict=True))


def on_fsdp2(name, dtype, options, steps):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    options = dict(options)
    events = options.pop("events", None)
    least = 2 if "window_format" in options else 1  # FSDP2 divides no scalar, and vectors inside a block of codes
    module = Tensors(dtype, [s for s in SHAPES if len(s) >= least])
    params = list(fully_shard(module, mesh=init_device_mesh("cpu", (dist.get_world_size(),))).parameters())
    return Run(built(name, params, options), params, steps, events).all()


class FactorRun(Run):
    """Gradients of a backward pass, of which each process has its own."""

    def __init__(self, optimizer, module, *rest):
        super().__init__(optimizer, list(module.parameters()), *rest)
        self.module = nn.parallel.DistributedDataParallel(module, bucket_cap_mb=0.01)
        optimizer.register_comm_hook(self.module)

    def step(self, step):
        generator = torch.Generator().manual_seed(2 * step + dist.get_rank())
        noise = [0.1 * torch.randn(p.shape, generator=generator, dtype=FP64).to(p.dtype) for p in self.params]
        if self.events == "nan" and step == self.steps // 2 and dist.get_rank():
            noise[1][0, 0] = torch.nan
        self.optimizer.zero_grad()
        self.module(noise).backward()
        self.optimizer.step()


def by_factors(name, dtype, options, steps, sharded=True):
    if "comm" not in get_optimizer_info(name).options() or "window_format" in options:
        return None  # factors have no codes
    options = dict(options)
    events, module = options.pop("events", None), Tensors(dtype, SHAPES)
    group = dist.group.WORLD if sharded else None
    return FactorRun(built(name, module, {**options, "comm": "factors"}, process_group=group), module, steps, events).all()


def by_factors_not_sharded(name, dtype, options, steps):
    return by_factors(name, dtype, options, steps, sharded=False)


class PieceRun(Run):
    """What ZeRO-1 and 2 do: every process trains its flat piece of all parameters."""

    def __init__(self, optimizer, params, *rest):
        self.optimizer, self.whole = optimizer, params
        self.size = sum(p.numel() for p in params) // dist.get_world_size()
        own = slice(dist.get_rank() * self.size, (dist.get_rank() + 1) * self.size)
        piece = torch.cat([p.detach().flatten() for p in params])[own].clone().requires_grad_()
        self.own, optimizer.param_groups[0]["params"] = own, [piece]
        super().__init__(optimizer, [piece], *rest)

    def set_gradients(self, step):
        flat = torch.cat([g.flatten() for g in gradients(self.whole, step)])
        if self.events == "nan" and step == self.steps // 2:
            flat[0] = torch.nan
        self.params[0].grad = flat[self.own] + 0.02 * self.params[0].detach()


def on_flat_pieces(name, dtype, options, steps):
    if "rank" in get_optimizer_info(name).options():
        return None  # has no low rank of a flat piece
    options = dict(options)
    events, params = options.pop("events", None), start(dtype, SHAPES[1:6])
    optimizer = built(name, params, options)
    take_flat_pieces(optimizer, sum(p.numel() for p in params))
    return PieceRun(optimizer, params, steps, events).all()


def take_flat_pieces(optimizer, coordinates):
    """The optimizer's method of that name; in older trees it takes the processes too, from one of two files."""
    arguments = [coordinates]
    if len(inspect.signature(optimizer.take_flat_pieces).parameters) == 2:
        try:
            from hf_efcp.distributed.shards import Shards
        except ImportError:
            from hf_efcp.distributed.ddp import Shards
        arguments.insert(0, Shards())
    optimizer.take_flat_pieces(*arguments)


PLACEMENTS = {
    "DDP shards": on_ddp_shards,
    "FSDP2": on_fsdp2,
    "comm=factors": by_factors,
    "comm=factors, not sharded": by_factors_not_sharded,
    "flat pieces": on_flat_pieces,
}


def attempted(function, *arguments):
    """The result of a configuration, or the error that it ended in, which is a difference like any other."""
    try:
        return function(*arguments)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def every_placement(rank, folder, steps):
    """One of two processes: all placements in turn."""
    prepare()
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    patience = datetime.timedelta(seconds=60)  # where only one of them has an error
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=patience)
    results = {}
    for placement, function in PLACEMENTS.items():
        for form, (dtype, options) in SEVERAL_FORMATS.items():
            for name in hf_efcp.list_optimizers():
                result = attempted(function, name, dtype, options, steps)
                if result is not None:
                    results[name, form, placement, rank] = result
    torch.save(results, Path(folder, f"{rank}.pt"))
    Path(folder, f"{rank}.done").touch()  # gloo aborts a process whose peer leaves early
    while len(list(Path(folder).glob("*.done"))) < 2:
        time.sleep(0.01)
    os._exit(0)


def several_processes(steps):
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(every_placement, (folder, steps), nprocs=2)
        first, second = (torch.load(Path(folder, f"{rank}.pt"), weights_only=True) for rank in range(2))
    return {**first, **second}


def prepare():
    """One thread, no warnings; and see that the package is that of the tree."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    if (tree := os.environ.get("HF_EFCP_TREE")) and not Path(hf_efcp.__file__).is_relative_to(Path(tree).resolve()):
        raise SystemExit(f"imported {hf_efcp.__file__}, which is not of {tree}")


def main():
    prepare()
    out, steps, processes = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    if processes == "several":
        results = several_processes(steps)
    else:
        results = {
            (name, form, "one process", 0): attempted(one_process, name, dtype, options, steps)
            for form, (dtype, options) in FORMATS.items()
            for name in hf_efcp.list_optimizers()
        }
    torch.save(results, out)


if __name__ == "__main__":
    main()
