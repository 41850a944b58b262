"""A plain Accelerate loop on two processes, which share the state, ends with the weights of one."""

import os
import subprocess
import sys

import pytest
import torch

from tests.integration.conftest import CHECKOUT
from tests.optim.helpers import same

# Every name in turn: training, save_state, more training; then load_state and the same again.
TWO_RANKS = """
import json, sys
import torch
from accelerate import Accelerator
import hf_efcp

def model_and_optimizer(accelerator, name, seed, error_dtype):
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(12, 40), torch.nn.LayerNorm(40), torch.nn.Linear(40, 3)).double()
    optimizer = hf_efcp.create_optimizer(name, model, lr=5e-3, window_size=4, update_rms=0.5, error_dtype=error_dtype,
                                         shard="auto")
    return accelerator.prepare(model, optimizer)

def train(accelerator, model, optimizer, start, stop):
    rank, world = accelerator.process_index, accelerator.num_processes
    for t in range(start, stop):
        generator = torch.Generator().manual_seed(t)
        inputs = torch.randn(8, 12, generator=generator, dtype=torch.float64)
        labels = inputs[:, :3].argmax(-1)
        x, y = inputs.chunk(world)[rank], labels.chunk(world)[rank]
        for half in (0, 1):
            with accelerator.accumulate(model):
                loss = torch.nn.functional.cross_entropy(model(x.chunk(2)[half]), y.chunk(2)[half])
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                optimizer.zero_grad()
    return torch.cat([p.detach().flatten() for p in model.parameters()])

def main(folder):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    found = {}
    for name in hf_efcp.list_optimizers():
        for error_dtype in (None, "bf16"):
            model, optimizer = model_and_optimizer(accelerator, name, accelerator.process_index, error_dtype)
            train(accelerator, model, optimizer, 0, 6)
            accelerator.save_state(f"{folder}/{name}")
            accelerator.wait_for_everyone()
            end = train(accelerator, model, optimizer, 6, 10)
            accelerator.free_memory()
            model, optimizer = model_and_optimizer(accelerator, name, 7, error_dtype)
            accelerator.load_state(f"{folder}/{name}")
            again = train(accelerator, model, optimizer, 6, 10)
            accelerator.free_memory()
            assert torch.equal(end, again), name
            found[f"{name} {error_dtype}"] = end
    found["wrapper"] = type(model).__name__
    torch.save(found, f"{folder}/rank{accelerator.process_index}.pt")
    accelerator.end_training()

main(sys.argv[1])
"""


@pytest.mark.slow
def test_two_ranks_end_with_the_weights_of_one(tmp_path, python):
    """DDP, the state shared: both ranks equal, and in fp64 within 1e-9 of one process at the same batch."""
    script = tmp_path / "script.py"
    script.write_text(TWO_RANKS)
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    done = python(script, tmp_path / "one")
    assert done.returncode == 0, done.stderr
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(CHECKOUT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run([*command, script, tmp_path / "two"], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    one, first, second = (torch.load(tmp_path / name) for name in ("one/rank0.pt", "two/rank0.pt", "two/rank1.pt"))
    assert (tmp_path / "two/efcp_lowrank_mfac/efcp_optim/index.json").is_file()
    assert not (tmp_path / "one/efcp_lowrank_mfac/efcp_optim").exists()
    assert first.pop("wrapper") == second.pop("wrapper") == "DistributedDataParallel"
    assert one.pop("wrapper") == "Sequential"
    assert first.keys() == second.keys() == one.keys()
    for case, weights in first.items():
        assert same(weights, second[case]), case
        if case.endswith("None"):
            assert (weights - one[case]).norm() < 1e-9 * one[case].norm(), case
