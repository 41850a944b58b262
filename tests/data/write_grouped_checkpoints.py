"""Write small checkpoints of optimizers whose groups are in the order of this version.

    git worktree add BASE 678ccc0
    cp tests/data/write_grouped_checkpoints.py BASE/tests/data
    PYTHONPATH=BASE OMP_NUM_THREADS=1 python -m tests.data.write_grouped_checkpoints tests/data/checkpoints_in_model_order

So the files there were written, by hf_efcp as it was at that commit and torch 2.13: `parameter_groups` then gave groups in the
order of the model, as Trainer got them. The format is that of write_checkpoints.py. The options are those of `--optim`, whose
error feedback is rounded by numbers that depend on how parameters are counted.
"""

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
from tests.data.write_checkpoints import CONTINUED, SAVED, flat, noise, write

USUAL = {"lr": 0.1, "window_size": 4}
CASES = {name: (name, {}) for name in hf_efcp.list_optimizers()}
CASES |= {"layer": ("efcp_lowrank_mfac", {"scope": "layer", "metric": "diagonal"})}
DISTRIBUTED = {"ddp_shards": "efcp_lowrank_mfac", "fsdp2": "efcp_sparse_mfac"}


class Model(nn.Module):
    """In this order: an embedding, matrices and vectors, a head."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, 16)
        self.layers = nn.Sequential(nn.Linear(16, 24), nn.LayerNorm(24), nn.Linear(24, 16))
        self.head = nn.Linear(16, 10, bias=False)
        generator = torch.Generator().manual_seed(0)
        for p in self.parameters():
            nn.init.normal_(p, generator=generator)

    def get_output_embeddings(self):
        return self.head


def given(name, options):
    """The options of a case; of USUAL those that the method has."""
    usual = {option: value for option, value in USUAL.items() if option in get_optimizer_info(name).options()}
    return hf_efcp.optim_defaults(name, **usual, **options)


class Grouped:
    """An optimizer with the groups of a model."""

    def __init__(self, name, options, frozen=(), **more):
        model = Model()
        for parameter_name, p in model.named_parameters():
            p.requires_grad_(parameter_name not in frozen)
        self.model = self.placed(model)
        self.params = [p for p in self.model.parameters() if p.requires_grad]
        groups = hf_efcp.parameter_groups(self.model, weight_decay=0.1)
        self.optimizer = hf_efcp.create_optimizer(name, groups, **given(name, options), **more)

    def placed(self, model):
        return model

    def train(self, begin, end):
        for step in range(begin, end):
            for p, g in zip(self.params, noise(self.params, step), strict=True):
                p.grad = g
            self.optimizer.step()


class Divided(Grouped):
    """FSDP2."""

    def placed(self, model):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        return fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))

    def train(self, begin, end):
        from torch.distributed.tensor import distribute_tensor

        for step in range(begin, end):
            for p, g in zip(self.params, noise(self.params, step), strict=True):
                p.grad = distribute_tensor(g, p.device_mesh, p.placements)
            self.optimizer.step()


RUNS = {"ddp_shards": Grouped, "fsdp2": Divided}


def write_alone(folder):
    for file, (name, options) in CASES.items():
        run = Grouped(name, options)
        run.train(0, SAVED)
        saved = {"optimizer": run.optimizer.state_dict(), "before": flat(run.params)}
        run.train(SAVED, SAVED + CONTINUED)
        write({**saved, "after": flat(run.params)}, folder / f"{file}.pt.gz")


def write_on_two(rank, folder, store):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{store}/store", rank=rank, world_size=2)
    for file, name in DISTRIBUTED.items():
        (folder / file).mkdir(exist_ok=True)
        run = RUNS[file](name, {})
        run.train(0, SAVED)
        saved = {"before": flat(run.params)}
        if file == "fsdp2":
            state = get_optimizer_state_dict(run.model, run.optimizer)
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
