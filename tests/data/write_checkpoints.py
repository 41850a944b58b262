"""Write small checkpoints of this version, which later versions have to load and continue.

    git worktree add BASE ededbca
    PYTHONPATH=BASE OMP_NUM_THREADS=1 python tests/data/write_checkpoints.py tests/data/checkpoints_0.1

So the files of checkpoints_0.1 were written, by hf_efcp 0.1.0 as it was at that commit and torch 2.13. The tests import their
problem from this file, so its functions ask for nothing but hf_efcp's public ones.

NAME.pt.gz is what torch.save writes of {"optimizer": the state_dict after `SAVED` steps, "before": the parameters then, flat,
"after": those of `CONTINUED` steps later}. A folder of two processes holds the same as run.pt.gz, and `efcp_optim` or `dcp`.
"""

import gzip
import io
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

# 1-D, two of one shape, whose blocks do not divide their rows, 4-D, 0-D.
SHAPES = ((7,), (6, 20), (6, 20), (4, 3, 3, 3), ())
LARGE = ((24, 8), (6, 20), (5,))  # the first is larger than all others together: it is divided by rows
LOSSY = {"rank": 2, "density": 0.2, "block_size": 16}  # of these options a method takes the ones that it has
USUAL = {"lr": 0.1, "window_size": 4, "update_rms": 0.3}
SAVED, CONTINUED = 6, 3

LOW_BIT = {"window_format": "low_bit", "error_format": "int4"}
MFAC_GGT = ("efcp_lowrank_mfac", "efcp_sparse_mfac", "efcp_dense_mfac", "efcp_lowrank_ggt", "efcp_sparse_ggt", "efcp_dense_ggt")
# File -> optimizer, options; a None takes an option of USUAL or LOSSY away.
CASES = {
    **{name: (name, {}) for name in MFAC_GGT},
    "low_bit_lowrank": ("efcp_lowrank_mfac", LOW_BIT),
    "low_bit_sparse": ("efcp_sparse_mfac", LOW_BIT),
    "bf16": ("efcp_sparse_ggt", {"error_dtype": "bf16", "window_dtype": "bf16"}),
    "layer": ("efcp_lowrank_mfac", {"scope": "layer", "momentum": 0.5, "weight_decay": 0.1}),
    "no_window": ("efcp_sparse_mfac", {"save_window": False}),
    "budget": ("efcp_lowrank_mfac", {"memory_budget": 8000, "window_size": None, "rank": None}),
}
DISTRIBUTED = {
    "ddp_shards": ("efcp_lowrank_mfac", {}),
    "fsdp2": ("efcp_sparse_mfac", {}),
    "factors": ("efcp_lowrank_mfac", {"comm": "factors"}),
}


def build(name, params, options, **more):
    """The optimizer of a case."""
    has = get_optimizer_info(name).options()
    given = {k: v for k, v in {**USUAL, **LOSSY, **options}.items() if k in has and v is not None}
    return hf_efcp.create_optimizer(name, params, **given, **more)


def start(shapes=SHAPES):
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(s, generator=generator)) for s in shapes]


def noise(params, step, rank=0):
    """Gradients; they do not depend on the parameters, so that rounding is not amplified."""
    generator = torch.Generator().manual_seed(10 * step + rank)
    return [0.1 * torch.randn(p.shape, generator=generator) for p in params]


def full(t):
    """The tensor as one process has it; collective where it is divided."""
    return (t.full_tensor() if hasattr(t, "full_tensor") else t).detach()


def flat(params):
    return torch.cat([full(p).flatten() for p in params])


def put(params, values):
    """Write flat values into the parameters, whole or divided."""
    from torch.distributed.tensor import distribute_tensor

    with torch.no_grad():
        for p, value in zip(params, values.split([p.numel() for p in params]), strict=True):
            value = value.view(p.shape)
            p.copy_(distribute_tensor(value, p.device_mesh, p.placements) if hasattr(p, "device_mesh") else value)


class Alone:
    """An optimizer on one process; subclasses are those of two."""

    def __init__(self, name, options, shapes=SHAPES):
        self.params = start(shapes)
        self.optimizer = build(name, self.params, options)

    def train(self, begin, end):
        for step in range(begin, end):
            for p, g in zip(self.params, noise(self.params, step), strict=True):
                p.grad = g
            self.optimizer.step()


class Shards(Alone):
    """DDP with the state divided."""

    def __init__(self, name, options):
        self.params = start(LARGE)
        self.optimizer = build(name, self.params, options, process_group=dist.group.WORLD)


class Module(nn.Module):
    """A model whose gradients are given."""

    def __init__(self):
        super().__init__()
        self.tensors = nn.ParameterList(start(LARGE))

    def forward(self, gradients):
        return sum((p * g).sum() for p, g in zip(self.tensors, gradients, strict=True))


class Factors(Alone):
    """comm=factors: each process has gradients of its own. On one process: their mean."""

    def __init__(self, name, options):
        self.module = Module()
        self.params = list(self.module.parameters())
        several = dist.is_initialized()
        self.optimizer = build(name, self.params, options, process_group=dist.group.WORLD if several else None)
        if several:
            self.ddp = nn.parallel.DistributedDataParallel(self.module)
            self.optimizer.register_comm_hook(self.ddp)

    def train(self, begin, end):
        for step in range(begin, end):
            self.optimizer.zero_grad()
            if dist.is_initialized():
                self.ddp(noise(self.params, step, dist.get_rank())).backward()
            else:
                parts = (noise(self.params, step, rank) for rank in range(2))
                for p, a, b in zip(self.params, *parts, strict=True):
                    p.grad = (a + b) / 2
            self.optimizer.step()


class FSDP2(Alone):
    """Parameters that are DTensors."""

    def __init__(self, name, options):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        self.module = fully_shard(Module(), mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        self.params = list(self.module.parameters())
        self.optimizer = build(name, self.params, options)

    def train(self, begin, end):
        from torch.distributed.tensor import distribute_tensor

        for step in range(begin, end):
            for p, g in zip(self.params, noise(self.params, step), strict=True):
                p.grad = distribute_tensor(g, p.device_mesh, p.placements)
            self.optimizer.step()


RUNS = {"ddp_shards": Shards, "fsdp2": FSDP2, "factors": Factors}


def write(saved, path):
    path.write_bytes(gzip.compress(_bytes(saved), mtime=0))


def read(path):
    """What `write` wrote."""
    with gzip.open(path) as file:
        return torch.load(file, weights_only=True)


def _bytes(saved):
    file = io.BytesIO()
    torch.save(saved, file)
    return file.getvalue()


def write_alone(folder):
    for file, (name, options) in CASES.items():
        run = Alone(name, options)
        run.train(0, SAVED)
        saved = {"optimizer": run.optimizer.state_dict(), "before": flat(run.params)}
        if not options.get("save_window", True):  # goes on as a run that was resumed
            run = Alone(name, options)
            put(run.params, saved["before"])
            run.optimizer.load_state_dict(saved["optimizer"])
        run.train(SAVED, SAVED + CONTINUED)
        write({**saved, "after": flat(run.params)}, folder / f"{file}.pt.gz")


def write_on_two(rank, folder, store):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{store}/store", rank=rank, world_size=2)
    for file, (name, options) in DISTRIBUTED.items():
        (folder / file).mkdir(exist_ok=True)
        run = RUNS[file](name, options)
        run.train(0, SAVED)
        saved = {"before": flat(run.params)}
        if file == "fsdp2":
            state = get_optimizer_state_dict(run.module, run.optimizer)
            dcp.save({"optimizer": state}, checkpoint_id=folder / file / "dcp")
        else:
            run.optimizer.save_shards(folder / file / "efcp_optim")
            saved["optimizer"] = run.optimizer.state_dict()
        run.train(SAVED, SAVED + CONTINUED)
        after = flat(run.params)
        if rank == 0:
            write({**saved, "after": after}, folder / file / "run.pt.gz")
    Path(store, f"{rank}.done").touch()  # gloo aborts a process whose peer leaves early
    while len(list(Path(store).glob("*.done"))) < 2:
        time.sleep(0.01)
    os._exit(0)


def main():
    warnings.simplefilter("ignore")
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    write_alone(folder)
    with tempfile.TemporaryDirectory() as store:
        mp.spawn(write_on_two, (folder, store), nprocs=2)


if __name__ == "__main__":
    main()
