"""Run a function on several gloo processes of this machine and collect what they return."""

import faulthandler
import logging
import multiprocessing
import os
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# Each process is a fork of a server that has imported these and has done nothing else: it starts without seconds of imports.
multiprocessing.set_forkserver_preload(["hf_efcp", "torch.distributed.checkpoint.state_dict", "torch.distributed.fsdp"])


def run(processes, function, *args):
    """[function(rank, *args) of every process]; what one raises is raised here."""
    with tempfile.TemporaryDirectory() as folder:
        given = (processes, folder, dict(os.environ), function, args)  # the server has the environment of its own start
        mp.start_processes(_process, given, processes, start_method="forkserver")
        return [torch.load(Path(folder, f"{rank}.pt"), weights_only=False) for rank in range(processes)]


def _process(rank, processes, folder, environment, function, args):
    os.environ.clear()
    os.environ.update(environment)
    faulthandler.enable()  # what a process does that dies of a signal
    torch.set_num_threads(1)
    logging.getLogger("hf_efcp.compiling").setLevel(logging.ERROR)  # who compiles first is chance
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=processes)
    torch.save(function(rank, *args), Path(folder, f"{rank}.pt"))
    dist.barrier()
    # gloo's threads abort a process whose peer leaves while it is in a collective, the barrier too,
    Path(folder, f"{rank}.done").touch()
    while len(list(Path(folder).glob("*.done"))) < processes:
        time.sleep(0.01)
    os._exit(0)  # and an interpreter that ends while something holds the group
