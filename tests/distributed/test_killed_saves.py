"""kill -9 at random moments of a save: every checkpoint before it can be read, and the interrupted one is refused."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from hf_efcp import OptionError
from tests.distributed.test_sharding import build, flat, problem, train

ROOT = Path(__file__).parents[2]
NAME = "efcp_lowrank_mfac"
# Two processes that save after every step, each time to a new folder.
SAVES = """
import sys
import torch, torch.multiprocessing as mp, torch.distributed as dist
from tests.distributed.test_sharding import build, flat, problem, train

def process(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    params = problem()
    optimizer = build("efcp_lowrank_mfac", params, process_group=dist.group.WORLD)
    for step in range(10_000):
        train(optimizer, params, step, step + 1)
        if rank == 0:
            torch.save([optimizer.state_dict(), [p.detach().clone() for p in params]], f"{folder}/{step}.pt")
        optimizer.save_shards(f"{folder}/{step}")

if __name__ == "__main__":
    mp.spawn(process, (sys.argv[1],), nprocs=2)
"""


def resumed(folder, step):
    """The optimizer and parameters of a checkpoint, one step on."""
    params = problem()
    optimizer = build(NAME, params)
    state, values = torch.load(folder / f"{step}.pt", weights_only=True)
    optimizer.shard_folder = folder / str(step)
    optimizer.load_state_dict(state)
    with torch.no_grad():
        for p, value in zip(params, values, strict=True):
            p.copy_(value)
    train(optimizer, params, step + 1, step + 2)
    return flat(params)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_only_the_interrupted_save_is_lost(seed, tmp_path):
    (tmp_path / "script.py").write_text(SAVES)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    killed = subprocess.Popen(
        [sys.executable, tmp_path / "script.py", tmp_path], env=environment, start_new_session=True, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "2").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(random.Random(seed).random() * 0.2)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()

    steps = sorted(int(path.name) for path in tmp_path.iterdir() if path.name.isdigit())
    assert len(steps) >= 2
    alone = problem()
    optimizer = build(NAME, alone)
    for step in range(steps[-1] + 2):
        train(optimizer, alone, step, step + 1)
        if step - 1 in steps[:-1]:
            torch.testing.assert_close(resumed(tmp_path, step - 1), flat(alone), rtol=1e-9, atol=1e-12)
    try:
        torch.load(tmp_path / f"{steps[-1]}.pt", weights_only=True)
    except (FileNotFoundError, EOFError, RuntimeError):  # the first process was still at its stub
        return
    try:
        torch.testing.assert_close(resumed(tmp_path, steps[-1]), flat(alone), rtol=1e-9, atol=1e-12)
    except OptionError as error:  # the interrupted one; else the kill came between two saves
        assert "no whole checkpoint" in str(error)
