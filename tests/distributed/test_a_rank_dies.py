"""A process that dies in the middle of training: the others end soon with an error; the run resumes from its checkpoint."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
STEPS, SAVED = 12, 5
# Two processes under torchrun; `python script.py FOLDER WHERE` with WHERE: between, inside, or never.
SCRIPT = f"""
import os, signal, sys
from pathlib import Path
import torch, torch.distributed as dist
from tests.distributed.test_sharding import build, flat, problem, train

folder, where = Path(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo")
rank, params = dist.get_rank(), problem()
optimizer = build("efcp_lowrank_mfac", params, process_group=dist.group.WORLD, momentum=0.5)
start = 0
if (folder / "{SAVED}.pt").exists():
    state, values = torch.load(folder / "{SAVED}.pt", weights_only=True)
    optimizer.shard_folder = folder / "{SAVED}"
    optimizer.load_state_dict(state)
    for p, value in zip(params, values):
        p.data.copy_(value)
    start = {SAVED}

def die(*args):
    os.kill(os.getpid(), signal.SIGKILL)

for step in range(start, {STEPS}):
    if step == {SAVED} + 2 and rank == 1 and where == "between":
        die()
    if step == {SAVED} + 2 and rank == 1 and where == "inside":
        optimizer.setup().placement.publish = die  # the row of K is summed; the others wait for the parameters
    train(optimizer, params, step, step + 1)
    if step + 1 == {SAVED} and start == 0:
        optimizer.save_shards(folder / "{SAVED}")
        if rank == 0:
            torch.save([optimizer.state_dict(), [p.detach().clone() for p in params]], folder / "{SAVED}.pt")
if rank == 0:
    torch.save(flat(params), folder / "end.pt")
dist.barrier()
os._exit(0)
"""
LAUNCH = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "hf_efcp.run"]


def launch(folder, where):
    """Exit status, stderr and seconds."""
    folder.mkdir(exist_ok=True)
    (folder / "script.py").write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    argv = [sys.executable, *LAUNCH, str(folder / "script.py"), str(folder), where]
    started = time.monotonic()
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=120, cwd=ROOT)
    return done.returncode, done.stderr, time.monotonic() - started


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    status, stderr, seconds = launch(folder, "never")
    assert status == 0, stderr
    return torch.load(folder / "end.pt"), seconds


@pytest.mark.slow
@pytest.mark.parametrize("where", ["between", "inside"])
def test_the_launch_ends_and_resumes_bit_for_bit(where, tmp_path, undisturbed):
    expected, usual = undisturbed
    status, stderr, seconds = launch(tmp_path, where)
    assert status != 0
    assert f"Signal {signal.SIGKILL.value} (SIGKILL)" in stderr
    assert seconds < 3 * usual + 30
    assert not (tmp_path / "end.pt").exists()
    status, stderr, _ = launch(tmp_path, "never")
    assert status == 0, stderr
    assert torch.equal(torch.load(tmp_path / "end.pt"), expected)


# Without a launcher: the survivor itself.
ALONE = """
import os, signal, sys, time
import torch, torch.distributed as dist, torch.multiprocessing as mp
from tests.distributed.test_sharding import build, problem, train

def process(rank, folder, where):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    params = problem()
    optimizer = build("efcp_lowrank_mfac", params, process_group=dist.group.WORLD)
    train(optimizer, params, 0, 3)
    die = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
    if rank == 1 and where == "inside":
        optimizer.setup().placement.publish = die
    elif rank == 1:
        die()
    started = time.monotonic()
    try:
        train(optimizer, params, 3, 6)
    except RuntimeError as error:
        print("SURVIVOR", round(time.monotonic() - started, 2), str(error)[:80].replace(chr(10), " "), flush=True)
    os._exit(0)

if __name__ == "__main__":
    others = [mp.get_context("spawn").Process(target=process, args=(rank, sys.argv[1], sys.argv[2])) for rank in range(2)]
    [p.start() for p in others]
    [p.join() for p in others]
"""


@pytest.mark.parametrize("where", [pytest.param("between", marks=pytest.mark.slow), "inside"])
def test_the_survivor_gets_an_error_and_does_not_hang(where, tmp_path):
    (tmp_path / "alone.py").write_text(ALONE)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    argv = [sys.executable, str(tmp_path / "alone.py"), str(tmp_path), where]
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.startswith("SURVIVOR"), done.stdout + done.stderr
    assert float(done.stdout.split()[1]) < 30
