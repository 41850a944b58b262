"""A worker dies in the middle of a round: the others stop with an error that says so, or go on where they were asked to."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
# Three processes; the last one dies after step 4. `python script.py FOLDER WHERE MIN_WORKERS`, MIN_WORKERS 0: none.
SCRIPT = """
import os, signal, sys
import torch, torch.distributed as dist, torch.multiprocessing as mp
from hf_efcp.local import LocalUpdates, WorkerError
from tests.local.runs import flat, model, optimizer_of, train

def process(rank, folder, where, least):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=3)
    net = model()
    optimizer = optimizer_of("adamw", net)
    options = {"min_workers": least, "worker_timeout": 25.0} if least else {}
    local = LocalUpdates(None, net, optimizer, sync_every=3, **options)
    train(net, optimizer, 4, rank)
    die = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
    if rank == 2 and where == "between":
        die()
    if rank == 2:
        local.workers.mean = die  # the others wait for it in the same synchronisation
    try:
        train(net, optimizer, 8, rank, start=4)
        torch.save({"weights": flat(net), "members": local.workers.members, "rounds": local.rounds}, f"{folder}/{rank}.pt")
    except WorkerError as error:
        print("ERROR", str(error).replace(chr(10), " "), flush=True)
    sys.stdout.flush()
    os._exit(0)

if __name__ == "__main__":
    given = (sys.argv[1], sys.argv[2], int(sys.argv[3]))
    workers = [mp.get_context("spawn").Process(target=process, args=(rank, *given)) for rank in range(3)]
    [w.start() for w in workers]
    [w.join() for w in workers]
"""


def launch(folder, where, least):
    (folder / "script.py").write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    argv = [sys.executable, str(folder / "script.py"), str(folder), where, str(least)]
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=580)
    return done.stdout, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("where", ["between", "inside"])
def test_the_others_go_on(where, tmp_path):
    stdout, stderr = launch(tmp_path, where, 2)
    assert "ERROR" not in stdout, stdout + stderr
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    assert torch.equal(found[0]["weights"], found[1]["weights"])
    assert [f["members"] for f in found] == [[0, 1], [0, 1]]
    assert [f["rounds"] for f in found] == [4, 4]
    assert "worker 2 did not come, and 2 go on" in stderr
    assert not (tmp_path / "2.pt").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("least", "message"), [(0, "probably as one has died"), (3, "2 of 3 workers are left, and min_workers=3")]
)
def test_the_others_stop_with_an_error(least, message, tmp_path):
    stdout, stderr = launch(tmp_path, "between", least)
    assert stdout.count("ERROR") == 2 and stdout.count(message) == 2, stdout + stderr
