"""Scripts that know nothing of hf_efcp, on two processes of this machine: the state is sharded, saved and resumed."""

import json

import pytest
import torch

from tests.integration.conftest import CHECKOUT
from tests.integration.test_scripts import SAVED, STEPS, command, steps

TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
ACCELERATE = ["accelerate.commands.launch", "--config_file", str(CHECKOUT / "recipes/configs/cpu.yaml")]


def shards(folder):
    return sorted(path.name for path in (folder / "efcp_optim").iterdir())


def test_torchrun_shards_saves_and_resumes_bit_for_bit(launch, arguments, tmp_path, run, capsys):
    launch(TORCHRUN, arguments)
    out, checkpoint = tmp_path / "out", tmp_path / f"out/checkpoint-{SAVED}"
    losses = [entry["loss"] for entry in steps(out)]
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])
    assert shards(checkpoint) == ["index.json", "rank_0.safetensors", "rank_1.safetensors"]
    stub = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    assert (stub["state"], stub["efcp"]["sharded"]["processes"]) == ({}, 2)

    launch(TORCHRUN, {**arguments, "output_dir": "again", "resume_from_checkpoint": str(checkpoint)})
    again = tmp_path / "again"
    assert steps(again) == steps(out)
    assert (again / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()

    # One process goes on from what two have saved; a lost shard is named.
    alone = {**arguments, "output_dir": "alone", "resume_from_checkpoint": str(checkpoint), "per_device_train_batch_size": 8}
    assert run(command("glue_like", alone)) == 0
    assert len(steps(tmp_path / "alone")) == STEPS
    (checkpoint / "efcp_optim/rank_1.safetensors").unlink()
    assert run(command("glue_like", {**alone, "output_dir": "lost"})) == 2
    assert "rank_1.safetensors is missing" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.slow
def test_accelerate_launch_does_the_same(launch, arguments, tmp_path):
    arguments["optim_args"] = json.dumps({"rank": 2, "window_size": 6, "scope": "layer"})
    launch(ACCELERATE, arguments)
    checkpoint = tmp_path / f"out/checkpoint-{SAVED}"
    assert shards(checkpoint) == ["index.json", "rank_0.safetensors", "rank_1.safetensors"]
    launch(ACCELERATE, {**arguments, "output_dir": "again", "resume_from_checkpoint": str(checkpoint)})
    assert steps(tmp_path / "again") == steps(tmp_path / "out")
